"""Tokens of one's own: new rows of embedding and head train and nothing else of them does, from 02 to a fresh process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from lib import fast, model, plan
from lib.loss import forward_loss
from lib.roles import Roles
from lib.stage import StageError
from tests.runner import Run, colour_rows, text_rows
from tests.test_families import find, inputs

CPU = torch.device("cpu")
GIVEN = {"tokens": ["<left>", "<right>"], "special_tokens": {"additional_special_tokens": ["<mark>"]}}


def rows(found):
    """Rows of a data file, in which the new words stand."""
    for number, each in enumerate(found):
        each["messages"][1]["content"] += f" <{'left' if number % 2 else 'right'}>"
        each["messages"][0]["content"][-1]["text"] += " <left> <right>"
    return found


@pytest.fixture(scope="module", params=[("llava", {}), ("llama_text", {}), ("llama_text", {"adapter": "qlora", "bf16": True})],
                ids=["untied", "tied", "tied-4bit"])
def run(request, tmp_path_factory, zoo):
    """A run through all six scripts, with new tokens and a merged model."""
    name, knobs = request.param
    folder = tmp_path_factory.mktemp("vocabulary")
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = rows(text_rows() if name == "llama_text" else colour_rows())
        return Run(folder, monkeypatch, zoo(name), made, merge=True, max_steps=3, learning_rate=1e-2, **GIVEN, **knobs).upto("06_save")


def test_all_scripts_run(run):
    print(run.json("04_lora/adapter.json"), run.json("06_save/check.json"))

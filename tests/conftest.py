"""What several test files need: quiet threads, no network, built checkpoints, a small set of pictures."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads on two busy cores are slower than one
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach out fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib.folder import being_written, unlock

# The engine starts a thread for each kind of device when it first runs, and a process with such threads can't
# fork and train. Fake tensors (lib/hollow.py) register CUDA, there or not; so it runs before there are any.
torch.ones(1, requires_grad=True).sum().backward()

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A function: a variant's name -> the folder of its checkpoint, built once for all tests."""
    from tests.zoo import build

    root = tmp_path_factory.mktemp("zoo")
    return functools.cache(lambda name: build(name, root / name))


@pytest.fixture(scope="session")
def script():
    """A function: a numbered script's stem -> its module; `script("02_data").main(argv)` runs the stage."""
    return importlib.import_module


@pytest.fixture(autouse=True)
def unlocked():
    """A stage that stopped within the test has left no lock, as if its process had ended."""
    yield
    for path in being_written():
        unlock(path)


@pytest.fixture(scope="session")
def browser():
    """A real headless browser (tests/browser.py), started once."""
    from tests.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    started = Browser()
    yield started
    started.close()


@pytest.fixture
def colours():
    """A function: folder -> its data.jsonl of questions about pictures, which are squares of one colour."""
    return write_colours


def write_colours(folder: Path, rows: int = len(COLOURS)) -> Path:
    """The path of a data.jsonl, written with its pictures: each row asks for the colour of one of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, colour in zip(range(rows), COLOURS):
        Image.new("RGB", (40 + 8 * number, 32), colour).save(folder / f"{colour}.png")
        question = {"role": "user", "content": "Which colour is it?"}
        answer = {"role": "assistant", "content": colour}
        lines.append({"messages": [question, answer], "images": [f"{colour}.png"]})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return data

"""What a family's record says beside the model's parts: what to install, what not, which checkpoint, which template."""
import importlib
import importlib.metadata
import importlib.util
import re
import socket

import pytest
import torch

from lib import registry
from lib.models import model
from lib.registry import FAMILIES
from lib.run import versions
from lib.run.errors import StageError
from lib.run.stage import ROOT
from lib.text import processor
from tests.runner import Run

load_model = importlib.import_module("03_load_model")
PINNED = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(.+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
REPLACED = [pair for family in FAMILIES for pair in family.use_instead.items()]


def test_a_recipe_may_name_the_processors_class_and_its_arguments_which_are_saved_with_it(zoo, tmp_path):
    own = processor.load_processor(zoo("llava"))
    assert own.vision_feature_select_strategy == "default"
    named = processor.load_processor(zoo("llava"), "LlavaProcessor", vision_feature_select_strategy="full")
    named.save_pretrained(tmp_path)
    again = processor.load_processor(tmp_path)
    assert type(again) is type(own) and again.vision_feature_select_strategy == "full"
    with pytest.raises(StageError, match="has no class 'NoProcessor'"):
        processor.load_processor(zoo("llava"), "NoProcessor")


@pytest.mark.parametrize("published, converted", REPLACED)
def test_a_published_id_that_cannot_be_trained_names_the_one_that_can(published, converted):
    for spelling in (published, published.lower()):
        with pytest.raises(StageError) as caught:
            registry.refuse_unloadable(spelling)
        assert caught.value.what == f"base_model: {spelling} is published in a format that isn't trained here"
        assert caught.value.fix == f"use the converted checkpoint: base_model: {converted}"
    registry.refuse_unloadable(converted)


def test_the_wrong_id_is_refused_before_any_download(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, "mistralai/Pixtral-12B-2409")
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(StageError, match="published in a format"):
        run.upto("02_data")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.packages], ids=lambda family: family.name)
def test_the_pip_line_names_the_versions_that_are_tested(family, monkeypatch):
    for module, pip in family.packages.items():
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?==(.+)", pip).groups()
        assert version == PINNED.get(name, version)
        if importlib.util.find_spec(module):
            assert version == importlib.metadata.version(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(StageError) as caught:
        registry.refuse_missing_packages(family)
    wanted = [f"'{pip}'" if "[" in pip else pip for pip in family.packages.values()]
    assert caught.value.fix == f"pip install {' '.join(wanted)}"


def test_a_family_that_needs_newer_transformers_is_refused_by_name_on_older_ones(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "5.22.0")
    assert registry.refuse_missing_packages(registry.family_of("llava")) is None
    with pytest.raises(StageError) as caught:
        registry.refuse_missing_packages(registry.family_of("voxtral"))
    assert caught.value.what == "transformers 5.22.0 is too old: Voxtral needs 5.23 or newer"


@pytest.fixture
def cuda_kernels(zoo, tmp_path, monkeypatch):
    """A package causal_conv1d that can be imported, as on a machine whose GPU is away."""
    zoo("lfm2_vl"), zoo("qwen3_5")      # before, or transformers would import it, and keep it for other tests
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


def test_kernels_that_need_cuda_are_refused_where_there_is_none(cuda_kernels, zoo):
    """Importable, transformers would take them for any tensor, and the first forward would fail inside of them."""
    plan = {"base_model": str(zoo("lfm2_vl")), "model_type": "lfm2_vl", "revision": None, "trust_remote_code": False}
    with pytest.raises(StageError) as caught:
        model.load(plan, torch.device("cpu"))
    assert caught.value.what == ("LFM2-VL would take the kernels of causal-conv1d, which need CUDA; this device is cpu")
    assert caught.value.fix == "pip uninstall causal-conv1d"


def test_kernels_that_need_cuda_are_welcome_on_cuda_and_no_matter_to_other_families(cuda_kernels):
    registry.refuse_cuda_packages(registry.family_of("lfm2_vl"), "cuda")
    registry.refuse_cuda_packages(registry.family_of("qwen2_5_vl"), "cpu")


def test_a_checkpoint_without_a_template_is_told_that_the_kits_own_serves(zoo, capsys):
    found = processor.complete(processor.load_processor(zoo("magistral")), registry.family_of("mistral3"))
    assert "[INST]" in found.chat_template
    assert "no chat template: lib/text/templates/mistral.jinja serves" in capsys.readouterr().out


@pytest.mark.parametrize("loss, explained", [(11.0, True), (3.0, False)])
def test_a_high_first_loss_is_explained_where_the_family_is_known_for_it(loss, explained, capsys):
    load_model.explain_high_loss(loss, 12.5, registry.family_of("gemma3n"))
    assert ("known to start high" in capsys.readouterr().out) == explained


def test_a_high_first_loss_is_not_excused_without_a_source(capsys):
    load_model.explain_high_loss(11.0, 12.5, registry.family_of("qwen2_5_vl"))
    assert capsys.readouterr().out == ""

"""Every recipe resolves with its real model, sets only what differs and says why, and trains on its family's tiny checkpoint."""
import importlib
import json
import math
import socket
import struct
import wave

import pytest
from PIL import Image

from lib import registry
from lib.config.knobs import knobs_of
from lib.config.rules import WARNINGS
from lib.run.stage import ROOT

config = importlib.import_module("01_config")

# The variant of the zoo that stands for each recipe's model.
VARIANTS = {
    "llava_1_5_lora": "llava", "pixtral_lora": "pixtral", "mistral_small_3_1_lora": "mistral3",
    "mistral_small_3_1_qlora": "mistral3", "magistral_qlora": "magistral", "mistral_small_4_lora": "mistral4",
    "mllama_lora": "mllama", "llama4_lora": "llama4", "gemma3_lora": "gemma3", "gemma3_qlora": "gemma3", "paligemma_lora": "paligemma",
    "gemma3n_lora": "gemma3n", "gemma4_lora": "gemma4_e2b", "gemma4_moe_lora": "gemma4_moe",
    "qwen2_vl_lora": "qwen2_vl", "qwen2_5_vl_lora": "qwen2_5_vl", "qwen2_5_vl_qlora": "qwen2_5_vl",
    "qwen3_vl_lora": "qwen3_vl", "qwen3_vl_moe_lora": "qwen3_vl_moe", "qwen3_vl_moe_experts_lora": "qwen3_vl_moe",
    "qwen3_5_lora": "qwen3_5", "qwen3_5_moe_lora": "qwen3_5_moe", "glm4v_lora": "glm4v", "glm4v_moe_lora": "glm4v_moe",
    "smolvlm2_lora": "smolvlm2", "lfm2_vl_lora": "lfm2_vl", "internvl_lora": "internvl", "internvl_qlora": "internvl",
    "paddleocr_vl_lora": "paddleocr_vl", "minicpmv_lora": "minicpmv", "voxtral_lora": "voxtral",
    "use_documents_qlora": "qwen2_5_vl", "use_medical_lora": "gemma3", "use_inspection_lora": "qwen3_vl", "use_assistant_lora": "qwen3_vl",
}
PATHS = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml")) if not path.stem.startswith("demo")}
ALIKE = ("base_model", "datasets", "adapter")                      # what every recipe says, and needs no comment
# Two steps on a CPU: a step of one row, and no worker processes, each of which would import torch anew.
SMALLER = ("max_steps=2", "gradient_accumulation_steps=1", "dataloader_num_workers=0")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the data files that recipes name, in which a row asks about one picture."""
    (tmp_path / "data").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (48, 40), colour).save(tmp_path / "data" / f"{colour}.png")
    write_rows(tmp_path / "data", "image", "images", ".png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(data, kind, column, suffix):
    """train.jsonl and test.jsonl, in which each row asks about one medium."""
    rows = [{"messages": [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Which colour?"}]},
                          {"role": "assistant", "content": colour}], column: [colour + suffix]} for colour in COLOURS]
    for name, some in (("train", rows), ("test", rows[:2])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def write_sounds(data):
    """As above, with half a second of a tone in place of a picture."""
    for number, colour in enumerate(COLOURS, start=1):
        tone = [int(9_000 * math.sin(number * place / 20)) for place in range(8_000)]
        with wave.open(str(data / f"{colour}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(struct.pack("<8000h", *tone))
    write_rows(data, "audio", "audios", ".wav")


def read(name):
    """(the recipe's text, the Recipe, {knob: where it was given}, notes)."""
    text = PATHS[name].read_text(encoding="utf-8")
    return text, *config.configure(PATHS[name], text)


def test_every_recipe_has_a_tiny_checkpoint_to_stand_for_its_model():
    assert VARIANTS.keys() == PATHS.keys()


def test_every_family_has_a_recipe(zoo):
    configs = [json.loads((zoo(name) / "config.json").read_text(encoding="utf-8")) for name in {*VARIANTS.values()}]
    assert {registry.family_of(each["model_type"]).name for each in configs} == {family.name for family in registry.FAMILIES}


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_resolves_without_a_network(name, folder, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    config.main([str(PATHS[name]), "run"])
    resolved = json.loads((folder / "run" / "01_config" / "config.json").read_text(encoding="utf-8"))
    assert f"base_model: {resolved['base_model']}\n" in PATHS[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_names_a_checkpoint_that_transformers_loads(name, folder):
    _, recipe, _, _ = read(name)
    assert "/" in recipe.base_model
    registry.refuse_unloadable(recipe.base_model)


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_says_what_it_is_for_and_claims_no_measurement(name):
    header = PATHS[name].read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("# ") and len(line) <= 110 for line in header)
    said = {line.split()[1] for line in header[1:]}
    assert {"For:", "Licence:", "Rows:"} <= said
    assert any(line.startswith("# For: one GPU of ") and line.endswith(" Not yet measured.") for line in header)


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_sets_only_what_differs_from_the_defaults_and_says_why(name, folder):
    text, recipe, given, notes = read(name)
    assert not notes, "a knob without meaning here"
    assert not [words for seldom_works, words in WARNINGS if seldom_works(recipe)]
    for knob in given:
        assert getattr(recipe, knob) != knobs_of(config.Recipe)[knob][1]["default"], knob
        (line,) = [line for line in text.splitlines() if line.startswith(f"{knob}:")]
        assert knob in ALIKE or " # " in line, knob


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_trains_two_steps_on_its_familys_tiny_checkpoint(name, folder, zoo):
    if name == "gemma3n_lora":
        pytest.importorskip("timm", reason="Gemma-3n's tower needs timm")
    if name == "voxtral_lora":
        pytest.importorskip("mistral_common", reason="Voxtral's tokenizer needs mistral-common")
        write_sounds(folder / "data")
    changed = (f"base_model={zoo(VARIANTS[name])}", *SMALLER)
    config.main([str(PATHS[name]), "run", *changed])
    for stem in ("02_data", "03_load_model", "04_lora", "05_train"):
        importlib.import_module(stem).main(["run"])
    metrics = (folder / "run" / "05_train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["step"] for row in map(json.loads, metrics) if "loss" in row] == [1, 2]
    assert_as_asked(folder / "run", read(name)[1])


def assert_as_asked(run, recipe):
    """What the recipe says of quantisation, adapted roles and picture sizes is what the stages made of it."""
    plan, adapter, processor = (json.loads((run / name).read_text(encoding="utf-8")) for name in (
        "03_load_model/model.json", "04_lora/adapter.json", "02_data/processor/processor_config.json"))
    assert (plan["quantisation"] or {"bits": 16})["bits"] == (4 if recipe.adapter == "qlora" else 16)
    assert set(recipe.lora_target_roles) <= adapter["trained_parameters"].keys()
    for knob, value in recipe.processor_kwargs.items():
        assert processor["image_processor"][knob] == value

"""06 and its views: at least twenty kinds of bad input, each of which ends in two lines and loses nothing."""

import contextlib
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.models import shards
from lib.run.ledger import stamp
from tests import harness
from tests.harness import Bad, bad_input
from tests.runner import Run, text_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory, zoo):
    """A folder with a base in several files, and a run up to 05_train on it that asks for a merged model."""
    folder = tmp_path_factory.mktemp("bad") / "whole"
    base = folder / "base"
    shutil.copytree(zoo("llama_text"), base)
    (base / "model.safetensors").unlink()
    tensors = shards.places(zoo("llama_text") / "model.safetensors")
    files = shards.cut(tensors, "0.3MB")
    for name, held in files.items():
        shards.write(base / name, held, lambda _, place: shards.rows(place))
    shards.write_index(base / shards.INDEX, files)
    assert len(files) == 2
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run = Run(folder, monkeypatch, base, text_rows(), merge=True, max_steps=2, save_steps=1)
        run.upto("05_train")
    return Path(shutil.copytree(folder, folder.with_name("spare"))), folder


@pytest.fixture
def folder(finished):
    """It as it was, at the same place, which its ledger knows."""
    spare, folder = finished
    shutil.rmtree(folder)
    return Path(shutil.copytree(spare, folder))


def gone(path):
    path.unlink()


def longer(path):
    path.write_bytes(path.read_bytes() + b" ")


def before_training(path):
    shutil.rmtree(path.parent)


def interrupted(path):
    path.unlink()
    path.parent.rename(path.parent.with_name("05_train.partial"))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def another_revision(path):
    configured_anew(path, "revision=v2")


def without_adapter(path):
    configured_anew(path, "adapter=null")


def configured_anew(recipe, override):
    with contextlib.chdir(recipe.parent):
        importlib.import_module("01_config").main([recipe.name, "run", override])


def without_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    vouched_for(path, tensors)


def with_a_tensor_too_many(path):
    tensors = load_file(path)
    vouched_for(path, tensors | {"more": torch.zeros(1)})


def vouched_for(path, tensors):
    """Write tensors, and have the ledger say that training wrote them."""
    save_file(tensors, path, metadata={"format": "pt"})
    ledger = path.parent.parent / "stage.json"
    content = json.loads(ledger.read_text(encoding="utf-8"))
    content["wrote"]["adapter/adapter_model.safetensors"] = stamp(path)
    ledger.write_text(json.dumps(content), encoding="utf-8")


ADAPTER = "run/05_train/adapter/adapter_model.safetensors"


def lost(name, path, change=gone):
    """A file of an earlier stage that is gone or edited, which the ledger sees."""
    stem = path.split("/")[1]
    word = "is gone" if change is gone else "changed"
    fix = f"to write it again and keep this folder as {stem}.old: python {stem}.py …run --force"
    return Bad(name, ["run"], f"{path} {word} since {stem} wrote it", fix, {path: change})


def unlike(name, path, change):
    """A file outside the run folder that is no longer what the run was made of."""
    word = "is gone" if change is gone else "changed"
    what = f"run/… is out of date: …{path} {word}…"
    return Bad(name, ["run"], what, "run first: python …", {path: change})


def misused(name, words, what, fix, files=()):
    """Words on the command line that can't be meant."""
    return Bad(name, words.split(), what, fix, dict(files))


CASES = (
    misused("no run folder", "nope", "nope, given on the command line, is no run folder", "make one: …"),
    Bad("a run that hasn't trained", ["run"], "run/05_train is not there: 05_train has not finished",
        "run first: python 05_train.py run", {"run/05_train/stage.json": before_training}),
    Bad("a training that was interrupted", ["run"], "run/05_train is not there: 05_train has not finished",
        "go on from its step-2 first: python 05_train.py run", {"run/05_train/stage.json": interrupted}),
    Bad("an adapter that lacks a tensor", ["run"],
        "run/05_train/adapter: 1 tensors don't fit the model, such as base_model.….lora_A.weight",
        "run 04_lora.py again with --force", {ADAPTER: without_a_tensor}),
    Bad("an adapter with a tensor too many", ["run"],
        "run/05_train/adapter: 1 tensors don't fit the model, such as more",
        "run 04_lora.py again with --force", {ADAPTER: with_a_tensor_too_many}),
    lost("an adapter that is gone", ADAPTER),
    lost("an adapter that was edited", ADAPTER, longer),
    lost("an adapter without its configuration", "run/05_train/adapter/adapter_config.json"),
    lost("golden logits that are gone", "run/05_train/golden.safetensors"),
    lost("metrics that were edited", "run/05_train/metrics.jsonl", longer),
    lost("a processor that is gone", "run/02_data/processor/tokenizer.json"),
    lost("held-out samples that are gone", "run/02_data/eval/state.json"),
    lost("a plan that was edited", "run/03_load_model/model.json", longer),
    lost("a list of targets that is gone", "run/04_lora/adapter.json"),
    lost("a recipe that is gone", "run/01_config/config.json"),
    unlike("a base whose configuration changed since training", "base/config.json", longer),
    unlike("a base whose weights changed since training", "base/model-00001-of-00002.safetensors", longer),
    unlike("a base that lost a file", "base/model-00002-of-00002.safetensors", gone),
    unlike("rows that changed since training", "rows.jsonl", longer),
    Bad("another base revision than trained on", ["run"],
        "run/02_data is out of date: revision changed: null -> \"v2\"", "run first: python 02_data.py run",
        {"recipe.yaml": another_revision}),
    Bad("an adapter where the recipe now says none", ["run"], "run/04_lora is out of date: adapter changed: …",
        "run first: python 04_lora.py run", {"recipe.yaml": without_adapter}),
    Bad("an adapter's file that isn't whole", ["run"], f"{ADAPTER} changed since 05_train wrote it",
        "to write it again and keep this folder as 05_train.old: python 05_train.py run --force",
        {ADAPTER: cut_short}),
    Bad("a ledger that isn't whole", ["run"], "run/05_train/stage.json is not whole JSON: …",
        "start 05_train.py again with --force", {"run/05_train/stage.json": cut_short}),
    Bad("a plan that is no JSON and vouched for by nobody", ["run"], "run/03_load_model/model.json changed …",
        "to write it again and keep this folder as …", {"run/03_load_model/model.json": "{"}),
    misused("two runs at once", "run run", "run: 06_save works on one run", "leave it out, or add --compare"),
    misused("--compare of one run", "run --compare", "--compare: only run is named", "name two runs or more"),
    misused("--compare with a run that isn't there", "run nope --compare",
            "nope, given on the command line, is no run folder", "make one: …"),
    misused("--compare with a run that hasn't trained", "run run2 --compare",
            "run2/05_train is not there: 05_train has not finished", "run first: python 05_train.py run2",
            {"run2/note": ""}),
    misused("--evaluate without --out", "run --evaluate rows.jsonl", "--evaluate and --out need one another",
            "--evaluate FILE --out predictions.jsonl"),
    misused("--out into a file that exists", "run --evaluate rows.jsonl --out rows.jsonl",
            "--out: rows.jsonl is there already", "name another file, or remove that one"),
    misused("--out into a folder that isn't there", "run --evaluate rows.jsonl --out nope/out.jsonl",
            "--out: nope is no folder", "make it, or name a file elsewhere"),
    misused("--ask without a question", "run --ask rows.jsonl", "--ask: rows.jsonl is a file, and no question "
            "follows it", "files come first, then one question in quotes"),
    misused("--evaluate of a file that isn't there", "run --evaluate x.jsonl --out out.jsonl",
            "datasets: x.jsonl: no such file or folder", "correct the path …"),
    misused("--evaluate of an empty file", "run --evaluate x.jsonl --out out.jsonl",
            "--evaluate: x.jsonl: holds no row", "name a file with rows", {"x.jsonl": ""}),
    misused("--evaluate of a row without an answer", "run --evaluate x.jsonl --out out.jsonl",
            "--evaluate: x.jsonl:1: nothing to learn: no assistant message has a text",
            "write what the assistant should answer, or remove the row",
            {"x.jsonl": '{"messages": [{"role": "user", "content": "What?"}]}\n'}),
)


@bad_input(CASES)
def test_bad_input_ends_in_two_lines_and_loses_nothing(case, folder):
    may_write = ["run/06_save.partial/*"] if "tensor" in case.name else []
    harness.check(case, "06_save", folder, may_write)

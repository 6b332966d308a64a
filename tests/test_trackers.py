"""Figures of a training in TensorBoard and Weights & Biases, where they are installed."""
import json

import pytest

from lib.run.errors import StageError
from lib.training import trackers
from tests import zoo
from tests.runner import Run


def test_tensorboard_holds_the_losses_of_metrics_jsonl(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    run = Run(tmp_path, monkeypatch, zoo.build("llama_text", tmp_path / "base"), [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}]} | {"images": []}
        for n in range(6)], use_tensorboard=True).upto("05_train")
    events = reader.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.losses(), rel=1e-6)
    assert "tokens_per_second" in events.Tags()["scalars"] and "eval_loss" in events.Tags()["scalars"]


def test_weights_and_biases_gets_figures_and_the_recipe_and_no_row(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tmp_path, monkeypatch, zoo.build("llama_text", tmp_path / "base"), [
        {"messages": [{"role": "user", "content": f"kumquat {n}?"}, {"role": "assistant", "content": "no"}], "images": []}
        for n in range(6)], wandb_project="mine").upto("05_train")
    wandb.finish()
    [file] = (run.path / "wandb").glob("offline-run-*/*.wandb")
    assert b"grad_norm" in file.read_bytes() and b"kumquat" not in file.read_bytes()


def test_a_tracker_that_is_not_installed_is_named():
    with pytest.raises(StageError) as caught:
        trackers.refuse_missing("no_such_tracker", "use_tensorboard")
    assert (caught.value.what, caught.value.fix) == (
        "use_tensorboard: the Python package no_such_tracker is not installed", "pip install no_such_tracker")


def test_only_figures_are_sent():
    row = json.loads('{"step": 3, "loss": 1.5, "skipped": ["rows-1"], "supervised_tokens": 4}')
    assert trackers.numbers(row) == {"loss": 1.5, "supervised_tokens": 4}

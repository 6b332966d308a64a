"""What goes wrong in a step ends in two lines that name the rows, and costs nothing that was on the disk."""

import importlib
import math
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.run import stage
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.training import faults, steps
from lib.training.parallel import World
from tests.runner import Run, fork, row, text_rows
from tests.test_resume import stop_at

ALONE = {"val_set_size": 0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 1}
ROWS = [row("What?", "red"), row("Which?", "green"), row("Quite what?", "blue"), row("Why?", "no")]


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run in a folder of its own, with 04_lora finished."""
    def make(rows=None, base=None, **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Run(folder, monkeypatch, base or zoo("llava"), rows or text_rows(), **ALONE | knobs).upto("04_lora")
    return make


# ---- no number ----

@pytest.fixture
def poisoned(make, zoo, tmp_path):
    """A checkpoint in which the letter Q is no number: only rows-2 holds one."""
    base = shutil.copytree(zoo("llava"), tmp_path / "poisoned")
    weights = load_file(base / "model.safetensors")
    tokenizer = Encoder.load(make().path / "02_data/processor").processor.tokenizer
    weights["language_model.model.embed_tokens.weight"][tokenizer("Q", add_special_tokens=False)["input_ids"][-1]] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("late", [0, 1])
def test_a_step_without_a_finite_loss_is_left_out_and_written_down(late, make, poisoned, monkeypatch):
    monkeypatch.setitem(steps.LATE, "cpu", late)                   # as on a GPU
    run = make(ROWS, poisoned, skip_nonfinite=1)
    run("05_train")
    skipped = [line for line in run.metrics() if "skipped" in line]
    assert [line["skipped"] for line in skipped] == [["rows-2"]]
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4] and len(run.losses()) == 3
    weights = load_file(run.path / "05_train/adapter/adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    number = skipped[0]["step"]
    before, after = (load_file(run.path / f"05_train/checkpoints/step-{n}/weights.safetensors")
                     for n in (number - 1, number)) if number > 2 else ({}, {})
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_more_such_steps_than_allowed_stop_the_run_also_after_a_restart(make, poisoned):
    run = make(ROWS, poisoned, skip_nonfinite=1, num_epochs=2)
    for _ in range(2):                                             # the second start goes on from a checkpoint
        with pytest.raises(StageError) as caught:
            run("05_train")
        assert caught.value.what.endswith(": a loss that is not finite, on 1 samples: rows-2 "
                                          "(1 such steps were skipped before)")
    assert stage.newest_checkpoint(run.path / "05_train.partial")


def test_a_gradient_that_is_not_finite_is_said_with_the_samples_of_its_step():
    run = SimpleNamespace(samples=SimpleNamespace(ids=["a-0", "a-1", "a-2"]), world=World(0, 1, torch.device("cpu")),
                          work=SimpleNamespace(config=SimpleNamespace(skip_nonfinite=1)), skipped=0)
    shares, found = [[[(0,), (2,)]]], [[[1.0, 0.0]]]
    assert faults.not_finite(run, 4, shares, found, norm=2.0) == []
    assert faults.not_finite(run, 4, shares, found, norm=math.inf) == ["a-0", "a-2"]
    with pytest.raises(StageError, match="step 6: gradient norm nan: a-0, a-2"):
        faults.not_finite(run, 5, shares, found, norm=math.nan)
    run.skipped = run.work.config.skip_nonfinite = 0
    with pytest.raises(StageError, match="step 1: a loss that is not finite, on 1 samples: a-2\n"):
        faults.not_finite(run, 0, [[[(0,)], [(2,)]]], [[[1.0, 0.0], [math.inf, 0.0]]], norm=2.0)


# ---- no memory ----

@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytearray(2**60)])
def test_out_of_memory_names_rows_their_tokens_and_three_knobs(allocate, make):
    run = make()
    before = stop_at(importlib.import_module("05_train"), "to_device", 3, how=allocate)
    child = fork("05_train", "run", before=before).wait()
    what, fix = child.said.splitlines()[-2:]
    assert child.code == 1 and "Traceback" not in child.said
    assert what.startswith("error: out of memory on cpu in step 3, on rows-") and what.endswith(" tokens)")
    assert fix.startswith("  fix: in 01_config.py, what helps most: adapter=qlora; gradient_checkpointing=true; ")
    assert stage.newest_checkpoint(run.path / "05_train.partial").name == "step-2"


@pytest.mark.parametrize("knobs, media, expected", [
    (dict(micro_batch_size=4, gradient_checkpointing=False, adapter=None), True,
     ["gradient_checkpointing=true", "micro_batch_size=1 gradient_accumulation_steps=8", "adapter=lora"]),
    (dict(micro_batch_size=1, gradient_checkpointing=True, adapter="qlora"), True,
     ["image_max_pixels, for smaller pictures", "sequence_len below 900, without the rows that are longer",
      "fewer roles that train"]),
])
def test_the_knobs_that_are_named_are_such_as_may_still_help(knobs, media, expected):
    assert faults.relief(SimpleNamespace(gradient_accumulation_steps=2, **knobs), 900, media) == expected


def test_the_knobs_that_are_named_first_save_most_by_the_forecast():
    knobs = SimpleNamespace(micro_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing="auto", adapter="lora")
    forecast = {"kept": {"activations_gib": 8.0}, "checkpointed": {"activations_gib": 6.5}, "gradients_gib": 0.1,
                "optimizer_gib": 0.2, "weights_gib": {"language bfloat16": 16.0, "vision bfloat16": 40.0}}
    assert faults.relief(knobs, 900, True, forecast) == [
        "adapter=qlora (about 11.5 GiB less)", "micro_batch_size=1 gradient_accumulation_steps=2 (about 4.0 GiB less)",
        "gradient_checkpointing=true (about 1.5 GiB less)"]


def test_another_error_is_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), faults.explained(SimpleNamespace(world=World(0, 1, None))):
        raise RuntimeError("shapes cannot be multiplied")


# ---- a worker ----

def test_a_dataloader_worker_that_dies_is_said_with_the_samples_it_was_needed_for(make):
    def kill_workers():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
    before = stop_at(importlib.import_module("05_train"), "to_device", 3, how=kill_workers)
    run = make(dataloader_num_workers=1, num_epochs=4)             # more than a worker has ready
    child = fork("05_train", "run", before=before).wait()
    assert child.code == 1 and "Traceback" not in child.said, (child.code, child.said)
    what, fix = child.said.splitlines()[-2:]
    assert what.startswith("error: DataLoader worker ") and ", at or soon after rows-" in what
    assert "fewer dataloader_num_workers" in fix
    assert stage.newest_checkpoint(run.path / "05_train.partial")

"""After a power cut at any moment of a checkpoint or a stage, the next start finds all that was promised."""

import functools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.fast import store
from lib.run import code, folder, ledger, stage
from lib.training import checkpoint, metrics
from tests.crash import Recorder, State

RUN = Path("runs/demo")


def each_state(recorder: Recorder, monkeypatch, at_least: int):
    """The states, one after the other in their folder; what is done to them need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    real = code.source
    found = functools.cache(lambda stem: real(stem, {}))         # no code changes here, and no knob is a hook
    monkeypatch.setattr(code, "source", lambda stem, knobs: found(stem))
    count = 0
    for count, state in enumerate(recorder.states(random.Random(7)), 1):
        state.build(recorder.root)
        yield state
    print(f"{count} states")
    assert count >= at_least                                       # fewer would mean that it saw too little


# ---- one checkpoint ----

def lines(step: int) -> bytes:
    """metrics.jsonl after so many steps."""
    return b"".join(b'{"step": %d, "loss": 1.0}\n' % number for number in range(1, step + 1))


def log(step: int) -> None:
    """One more line is written, as far as the system knows."""
    with (RUN / "05_train.partial/metrics.jsonl").open("ab") as file:
        file.write(lines(step)[len(lines(step - 1)):])


def begin_training() -> stage.Work:
    """05_train has begun, and has a first checkpoint."""
    work = stage.begin(stage.decide("05_train", RUN, force=True))
    log(1)
    save(work.path, 1)
    return work


def save(path: Path, step: int) -> None:
    """A checkpoint, as 05 writes it; the newest one is kept alone."""
    p = torch.nn.Parameter(torch.full((2, 2), float(step)))
    optimizer = torch.optim.AdamW([p], lr=0.0, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with checkpoint.Writer(path, keep=1) as saves:
        saves.save(step, {"p": p}, optimizer, {"global_batch_size": 4, "per_rank": 4})


def files(path: Path) -> dict[str, bytes]:
    """{name: content} of a folder's files."""
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def test_a_checkpoint_is_there_or_the_one_before_it_is(kit, monkeypatch):
    partial = begin_training().path
    written = {"step-1": files(partial / "checkpoints/step-1")}
    with Recorder(partial) as recorder:
        recorder.mark("step-1")
        log(2)
        save(partial, 2)
        recorder.mark("step-2")
        written["step-2"] = files(partial / "checkpoints/step-2")
        log(3), log(4)
        metrics.cut_back(partial / "metrics.jsonl", 2)             # a start that goes on from it
        log(3)
        save(partial, 3)
        recorder.mark("step-3")
        written["step-3"] = files(partial / "checkpoints/step-3")
    for state in each_state(recorder, monkeypatch, at_least=1200):
        found = folder.newest_checkpoint(partial)
        assert found == folder.checkpoints(partial)[0]             # none had to be passed over
        assert files(found) == written[found.name] and found.name >= state.mark
        step = json.loads((found / "state.json").read_text(encoding="utf-8"))["step"]
        assert b"".join(metrics.lines_up_to(partial / "metrics.jsonl", step)) == lines(step)
    decision = stage.decide("05_train", RUN)
    assert (decision.action, decision.checkpoint) == ("resume", found)


# ---- one stage ----

def write(stem: str, text: str, force: bool) -> None:
    """A stage has run in this process and written this text, unless it was up to date."""
    work = stage.begin(stage.decide(stem, RUN, force=force))
    if work is not None:
        (work.path / "parts").mkdir(exist_ok=True)
        for name in ("out.txt", "parts/one.txt", "parts/two.txt"):
            (work.path / name).write_text(text)
        work.finish()


def whole(path: Path) -> bool:
    """Whether a stage folder is finished, and holds what its ledger says."""
    return ledger.finished(path) and not ledger.edited_outputs(path)


@pytest.mark.parametrize("before", ["first", "again", "forced"])
def test_a_stage_is_finished_whole_or_runs_again(before, kit, monkeypatch):
    final, force = RUN / "04_lora", before == "forced"
    old = files(final)
    if before == "first":
        shutil.rmtree(final)
    if before == "again":
        text = (final / "stage.json").read_text()
        (final / "stage.json").write_text(text.replace('"lora_r": 16', '"lora_r": 8'))
    with Recorder(RUN) as recorder:
        write("04_lora", "new", force)
        recorder.mark("finished")
    for state in each_state(recorder, monkeypatch, at_least=100):
        decision = stage.decide("04_lora", RUN)
        assert decision.action in ("skip", "run"), decision
        if decision.action == "skip":
            assert whole(final) and ((final / "out.txt").read_text() == "new" or files(final) == old)
        if force:                                                  # what is replaced by force is kept
            assert old in (files(final), files(RUN / "04_lora.old"))
        if state.mark == "finished":
            assert decision.action == "skip" and (final / "out.txt").read_text() == "new"
        write("04_lora", "new", force=False)
        assert whole(final) and stage.decide("04_lora", RUN).action == "skip"


def test_a_training_that_ends_is_finished_or_goes_on_from_its_checkpoint(kit, monkeypatch):
    final = RUN / "05_train"
    old = files(final)
    work = begin_training()
    with Recorder(RUN) as recorder:
        (work.path / "adapter").mkdir()
        (work.path / "adapter/weights").write_text("trained")
        work.finish(volatile=("checkpoints",))
        recorder.mark("finished")
    for state in each_state(recorder, monkeypatch, at_least=15):
        decision = stage.decide("05_train", RUN)
        assert decision.action in ("skip", "resume"), decision
        assert old in (files(final), files(RUN / "05_train.old"))
        if decision.action == "skip":
            assert whole(final) and (final / "adapter/weights").read_text() == "trained"
        else:
            assert state.mark != "finished" and not folder.damage(decision.checkpoint)


# ---- kept features ----

def test_a_file_of_kept_features_is_whole_or_not_there(tmp_path, monkeypatch):
    with Recorder(tmp_path) as recorder:
        for name in ("one", "two"):
            store.write({"pooler_output": torch.arange(4.0)}, tmp_path / f"{name}.safetensors")
    for _ in each_state(recorder, monkeypatch, at_least=20):
        for path in tmp_path.glob("*.safetensors"):
            assert load_file(path)["pooler_output"].tolist() == [0, 1, 2, 3]


# ---- the model of the disk itself ----

def test_what_was_not_synced_may_be_lost_and_what_was_may_not(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with Recorder(root) as recorder:
        (root / "a").write_text("abcd")
        ledger.sync(root / "a")
        recorder.mark("content")
        ledger.sync(root)
        recorder.mark("name")
        (root / "a").rename(root / "b")
    trees = {mark: {state.tree for state in recorder.states(random.Random(0)) if state.mark == mark}
             for mark in ("", "content", "name")}
    lost, safe = (), (("a", b"abcd"),)
    assert trees[""] == {lost, safe, (("a", b""),), (("a", b"ab"),), (("a", bytes(4)),)}
    assert trees["content"] == {lost, safe}
    assert trees["name"] == {safe, (("b", b"abcd"),)}
    State(safe, "").build(root)
    assert files(root) == {"a": b"abcd"}

"""05, killed at any moment and started again, ends with the bytes that it would have had."""

import importlib
import os
import signal

import pytest

from lib import checkpoint, golden, metrics, stage
from lib.metrics import cut_back
from lib.stage import StageError
from tests.runner import Run, fork

# Two epochs of 7 samples, 4 a step: 4 steps, with a checkpoint after each, and dropout to be repeated.
KNOBS = {"num_epochs": 2, "save_steps": 1, "lora_dropout": 0.2}


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run in a folder of its own, with 04_lora finished."""
    def make(**knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Run(folder, monkeypatch, zoo("llava"), **KNOBS | knobs).upto("04_lora")
    return make


def die():
    """Never returns: as `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at(place, name, call, how=die, after=False):
    """A function for a forked process: there, from the given call of `place.name` on, `how` happens."""
    def prepare():
        original, calls = getattr(place, name), []

        def stopping(*given, **named):
            calls.append(None)
            if len(calls) == call and not after:
                how()
            result = original(*given, **named)
            if len(calls) == call and after:
                how()
            return result
        setattr(place, name, stopping)
    return prepare


MOMENTS = {
    "in the middle of a step": lambda: stop_at(importlib.import_module("05_train"), "forward_loss", 6),
    "between a step and its checkpoint": lambda: stop_at(metrics.Log, "step", 3, after=True),
    "in the middle of writing a checkpoint": lambda: stop_at(checkpoint, "moments", 3),
    "before a checkpoint gets its name": lambda: stop_at(checkpoint.os, "replace", 3),
    "while an old checkpoint is removed": lambda: stop_at(checkpoint, "prune", 4),
    "after the last step": lambda: stop_at(golden, "fingerprint", 1),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, zoo):
    """What training leaves where nothing happens to it: (metrics.jsonl, the adapter), as bytes."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return left_by(Run(folder, monkeypatch, zoo("llava"), **KNOBS).upto("05_train"))


def left_by(run):
    files = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    return [(run.path / "05_train" / name).read_bytes() for name in files]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_changes_nothing_in_what_training_leaves(moment, make, finished):
    run = make()
    child = fork("05_train", "run", before=MOMENTS[moment]()).wait()
    assert child.code == -signal.SIGKILL, child.said
    assert not (run.path / "05_train").exists() and stage.newest_checkpoint(run.path / "05_train.partial")
    run("05_train")
    assert left_by(run) == finished
    assert not list((run.path / "05_train/checkpoints").glob(".*"))


@pytest.mark.parametrize("knobs", [{"adapter": None}, {"optimizer": "adamw_torch"}, {"bf16": True}])
def test_full_fine_tuning_and_every_optimizer_resume_to_the_byte(knobs, make):
    whole, killed = make(**knobs), make(**knobs)
    whole("05_train")
    killed.chdir(killed.folder)
    assert fork("05_train", "run", before=stop_at(metrics.Log, "step", 3)).wait().code == -signal.SIGKILL
    killed("05_train")
    one, two = (run.path / "05_train" for run in (whole, killed))
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    assert (one / "golden.safetensors").read_bytes() == (two / "golden.safetensors").read_bytes()


def test_a_kill_before_the_first_checkpoint_starts_over(make, finished, capsys):
    run = make()
    fork("05_train", "run", before=stop_at(metrics.Log, "step", 1)).wait()
    assert (run.path / "05_train.partial").exists()
    capsys.readouterr()
    run("05_train")
    assert "goes on" not in capsys.readouterr().out and left_by(run) == finished


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(make, finished):
    run = make()
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    child = fork("05_train", "run", before=stop_at(metrics.Log, "step", 3, how=interrupt)).wait()
    assert child.code == 130
    assert "05_train interrupted: step-2 is kept" in child.said
    assert "go on from it: python 05_train.py run" in child.said and "Traceback" not in child.said
    run("05_train")
    assert left_by(run) == finished


def test_a_full_disk_loses_no_checkpoint(make, finished):
    run = make()

    def full():
        raise OSError(28, "No space left on device")
    child = fork("05_train", "run", before=stop_at(checkpoint, "save_file", 5, how=full)).wait()
    assert child.code == 1 and "no space left" in child.said and "Traceback" not in child.said
    assert stage.newest_checkpoint(run.path / "05_train.partial").name == "step-2"
    run("05_train")
    assert left_by(run) == finished


# ---- what changed meanwhile ----

@pytest.fixture
def killed(make):
    """A run whose training was killed after its second checkpoint."""
    run = make()
    fork("05_train", "run", before=stop_at(metrics.Log, "step", 3)).wait()
    return run


def test_a_changed_recipe_is_refused_until_resume_or_force_is_given(killed):
    killed("01_config", "learning_rate=5e-4")
    with pytest.raises(StageError, match="since its training began learning_rate changed") as caught:
        killed("05_train")
    assert "--resume" in caught.value.fix and "--force" in caught.value.fix
    killed("05_train", "--resume")
    steps = [line for line in killed.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[1]["learning_rate"] > 5e-4 >= steps[2]["learning_rate"]


def test_force_starts_over_and_keeps_the_old_checkpoints(killed, finished):
    killed("05_train", "--force")
    assert left_by(killed) == finished
    assert (killed.path / "05_train.old/checkpoints/step-2/state.json").exists()


def test_another_number_of_samples_a_step_is_refused_with_its_fix(killed):
    killed("01_config", "gradient_accumulation_steps=1")
    with pytest.raises(StageError) as caught:
        killed("05_train", "--resume")
    assert caught.value.what.endswith("_accumulation_steps is 2; the checkpoint was made with 4")
    assert caught.value.fix == "change them back, or start over with --force"
    assert (killed.path / "05_train.partial/checkpoints/step-2/state.json").exists()


def test_other_micro_batches_of_the_same_step_may_go_on(killed):
    killed("01_config", "gradient_accumulation_steps=4", "micro_batch_size=1")
    killed("05_train", "--resume")
    assert len(killed.losses()) == 4


def test_how_often_to_save_is_no_part_of_a_training(killed, finished):
    killed("01_config", "save_steps=2", "save_total_limit=1")
    killed("05_train")
    assert left_by(killed) == finished


def test_a_finished_training_is_not_trained_again(make, capsys):
    run = make()
    run("05_train")
    before = left_by(run)
    capsys.readouterr()
    run("05_train")
    assert "up to date" in capsys.readouterr().out and left_by(run) == before


# ---- checkpoints ----

@pytest.mark.parametrize("limit, kept", [(1, ["step-4"]), (3, ["step-2", "step-3", "step-4"])])
def test_only_the_newest_checkpoints_are_kept(limit, kept, make):
    run = make(save_total_limit=limit)
    run("05_train")
    assert sorted(path.name for path in (run.path / "05_train/checkpoints").iterdir()) == kept


def test_ten_is_newer_than_nine(tmp_path):
    for step in (9, 10, 8):
        (tmp_path / f"step-{step}").mkdir()
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def test_a_checkpoint_of_other_tensors_is_refused(make):
    one, other = make(), make(lora_target_roles=["language", "projector"])
    one("05_train")
    path = one.path / "05_train/checkpoints/step-4"
    training = importlib.import_module("05_train")
    other.chdir(other.folder)
    from lib.parallel import world
    with world() as alone:
        run = training.load(stage.view("05_train", other.path), alone)
        with pytest.raises(StageError, match="4 trained tensors differ from this run's, such as .*project"):
            checkpoint.load(path, run.parameters, run.optimizer)


def test_lines_after_a_checkpoint_are_cut_off_and_so_is_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0}\n{"step": 1}\n{"step": 1, "eval_loss": 2}\n'
    path.write_text(kept + '{"step": 2}\n{"st', encoding="utf-8")
    cut_back(path, last_step=1)
    assert path.read_text(encoding="utf-8") == kept

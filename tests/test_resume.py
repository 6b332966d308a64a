"""05, killed at any moment and started again, ends with the bytes that it would have had."""

import importlib
import os
import resource
import signal
import subprocess
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from lib.evaluation import golden
from lib.evaluation.golden import fingerprint
from lib.run import folder, stage
from lib.run.errors import StageError
from lib.training import checkpoint, metrics
from lib.training.metrics import cut_back
from tests.runner import fork

# Two epochs of 7 samples, 4 a step: 4 steps, with a checkpoint after each, and dropout to be repeated.
KNOBS = {"num_epochs": 2, "save_steps": 1, "lora_dropout": 0.2}


@pytest.fixture
def make(make_run):
    """A function: knobs -> a run in a folder of its own, with 04_lora finished."""
    return partial(make_run, "llava", **KNOBS)


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


def after_two(how=die):
    """`how` happens once the second checkpoint is whole and the third one is about to be written."""
    return stop_at(checkpoint, "moments", 3, how)


MOMENTS = {
    "in the middle of a step": lambda: stop_at(importlib.import_module("05_train"), "to_device", 6),
    "between a step and its checkpoint": lambda: stop_at(metrics.Log, "step", 3, after=True),
    "in the middle of writing a checkpoint": lambda: stop_at(checkpoint, "save_file", 6),
    "before a checkpoint is sealed": lambda: stop_at(folder, "seal", 3),
    "before a checkpoint gets its name": lambda: stop_at(checkpoint.os, "replace", 3),
    "while an old checkpoint is removed": lambda: stop_at(checkpoint, "prune", 4),
    "after the last step": lambda: stop_at(golden, "fingerprint", 1),
}


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """What training leaves where nothing happens to it: (metrics.jsonl, the adapter), as bytes."""
    with pytest.MonkeyPatch.context() as patch:
        run = prepared("llava", None).twin(tmp_path_factory.mktemp("finished") / "0", patch, **KNOBS)
        run("05_train")
        return left_by(run)


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
    child = fork("05_train", "run", before=stop_at(metrics.Log, "step", 3)).wait()
    assert child.code == -signal.SIGKILL, child.said
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
    assert "05_train interrupted: step-3 is kept" in child.said
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
    fork("05_train", "run", before=after_two()).wait()
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


def test_fewer_steps_than_the_checkpoint_has_are_refused_with_their_knob(killed):
    killed("01_config", "max_steps=1")
    with pytest.raises(StageError) as caught:
        killed("05_train", "--resume")
    assert caught.value.what == f"{killed.path.name}/05_train.partial/checkpoints/step-2 is past the 1 step that max_steps now asks for"
    assert caught.value.fix == "raise max_steps to go on from it, or start over with --force"


def test_a_checkpoint_of_an_older_version_is_refused_by_what_it_lacks(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3, "global_batch_size": 4, "per_rank": 4}', encoding="utf-8")
    with pytest.raises(StageError, match="doesn't say its scaler and groups: an older version wrote it"):
        checkpoint.read_state(tmp_path)


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
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    checkpoint.prune(tmp_path, step=10, keep=1)
    assert [path.name for path in folder.checkpoints(tmp_path)] == ["step-10"]


def test_a_checkpoint_of_other_tensors_is_refused(make):
    one, other = make(), make(lora_target_roles=["language", "projector"])
    one("05_train")
    path = one.path / "05_train/checkpoints/step-4"
    training = importlib.import_module("05_train")
    other.chdir(other.folder)
    from lib.training.parallel import world
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


def test_a_damaged_checkpoint_is_passed_over_with_a_word_for_the_one_before(make, finished, capsys):
    run = make()
    fork("05_train", "run", before=stop_at(checkpoint, "moments", 4)).wait()
    weights = run.path / "05_train.partial/checkpoints/step-3/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1                                               # a single bit
    weights.write_bytes(content)
    capsys.readouterr()
    run("05_train")
    said = capsys.readouterr().out
    assert "step-3 is passed over, since it is damaged: weights.safetensors is not as it was written" in said
    assert "goes on from run/05_train.partial/checkpoints/step-2" in said
    assert left_by(run) == finished


def test_when_every_checkpoint_is_damaged_only_force_starts_over(killed):
    for path in killed.path.glob("05_train.partial/checkpoints/step-*"):
        (path / "state.json").unlink()
    with pytest.raises(StageError, match="every checkpoint is damaged, such as .*step-2: state.json is gone") as caught:
        killed("05_train")
    assert caught.value.fix.endswith("--force")


@pytest.mark.parametrize("harm, words", [
    (lambda path: (path / "state.json").unlink(), "state.json is gone"),
    (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS is gone"),
    (lambda path: (path / "SHA256SUMS").write_text("", encoding="utf-8"), "state.json is not as it was written"),
    (lambda path: (path / "more.json").write_text("{}", encoding="utf-8"), "more.json is not as it was written"),
    (lambda path: (path / "SHA256SUMS").write_bytes(b"\xff\xfe"), "'utf-8' codec can't decode"),
])
def test_every_harm_to_a_sealed_folder_is_seen(harm, words, tmp_path):
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    folder.seal(tmp_path)
    assert folder.damage(tmp_path) == ""
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path).returncode == 0
    harm(tmp_path)
    assert folder.damage(tmp_path).startswith(words)


# ---- stopping ----

@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_comes_after_the_step_with_a_checkpoint_and_its_exit_code(sign, code, make, finished):
    run = make(save_steps=None, saves_per_epoch=0)                 # no other checkpoint than that of the stop
    ask = lambda: os.kill(os.getpid(), sign)  # noqa: E731
    before = stop_at(importlib.import_module("05_train"), "to_device", 6, ask)
    child = fork("05_train", "run", before=before).wait()
    assert child.code == code and "05_train interrupted: step-3 is kept" in child.said
    run("05_train")
    assert left_by(run) == finished


def test_a_second_ctrl_c_stops_at_once_but_not_under_torchrun(make):
    make()

    def twice():
        os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)
    before = stop_at(importlib.import_module("05_train"), "to_device", 6, twice)
    child = fork("05_train", "run", before=before).wait()
    assert child.code == 130 and "step-2 is kept" in child.said
    child = fork("05_train", "run", before=stop_at(importlib.import_module("05_train"), "to_device", 1, twice),
                 TORCHELASTIC_RUN_ID="demo").wait()
    assert child.code == 130 and "step-3 is kept" in child.said


def test_what_torchrun_restarts_goes_on_although_it_was_started_with_force(make, finished):
    run = make()
    run("05_train")
    fork("05_train", "run", "--force", before=after_two()).wait()
    child = fork("05_train", "run", "--force", TORCHELASTIC_RESTART_COUNT="1").wait()
    assert child.code == 0 and "goes on from run/05_train.partial/checkpoints/step-2" in child.said
    assert left_by(run) == finished
    assert (run.path / "05_train.old/stage.json").exists()         # what --force replaced
    child = fork("05_train", "run", "--force", TORCHELASTIC_RESTART_COUNT="1").wait()
    assert child.code == 0 and "runs: --force" in child.said       # without a checkpoint of its own


# ---- no room ----

def test_a_file_size_limit_loses_no_checkpoint(make, finished):
    run = make()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    child = fork("05_train", "run", before=after_two(limit)).wait()
    assert child.code == 1 and "a file of this size is not allowed" in child.said
    assert "goes on from step-2" in child.said and "Traceback" not in child.said
    run("05_train")
    assert left_by(run) == finished


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    p, writing, go_on = torch.nn.Parameter(torch.ones(3)), threading.Event(), threading.Event()
    original = checkpoint.save_file

    def slow(*given):
        writing.set()
        assert go_on.wait(30)
        original(*given)
    monkeypatch.setattr(checkpoint, "save_file", slow)
    (tmp_path / "metrics.jsonl").touch()
    with checkpoint.Writer(tmp_path, keep=1) as saves:
        saves.save(1, {"p": p}, torch.optim.AdamW([p]), {})
        assert writing.wait(30) and folder.newest_checkpoint(tmp_path) is None
        p.data.zero_()                                             # the next step, meanwhile
        go_on.set()
    checkpoint.load_weights(tmp_path / "checkpoints/step-1", {"p": p})
    assert p.tolist() == [1, 1, 1]


# ---- the best step ----

# The loss falls, so that the highest one, which shall be the best here, comes early for certain.
EVALUATED = {"evals_per_epoch": 2, "num_epochs": 4, "greater_is_better": True}


def evaluations(run):
    """{step: eval_loss}, without the one before training."""
    return {line["step"]: line["eval_loss"] for line in run.metrics() if line["step"] and "eval_loss" in line}


def test_the_best_evaluations_weights_are_saved_and_its_checkpoint_is_kept(make):
    run = make(**EVALUATED, load_best_model_at_end=True, save_total_limit=1)
    run("05_train")
    losses = evaluations(run)
    best = max(losses, key=losses.get)
    assert len(losses) == 8 and best < 8                           # or the test shows nothing
    origin = run.json("05_train/trained.json")
    assert (origin["step"], origin["trained_steps"], origin["best"]["eval_loss"]) == (best, 8, losses[best])
    kept = load_file(run.path / f"05_train/checkpoints/step-{best}/weights.safetensors")
    saved = load_file(run.path / "05_train/adapter/adapter_model.safetensors")
    assert sorted(map(fingerprint, kept.values())) == sorted(map(fingerprint, saved.values()))
    assert len(list((run.path / "05_train/checkpoints").iterdir())) == 2


def test_early_stopping_counts_evaluations_since_the_best_and_survives_a_kill(make):
    stopped, killed = (make(**EVALUATED, early_stopping_patience=2) for _ in range(2))
    stopped("05_train")
    losses = evaluations(stopped)
    last = stopped.metrics()[-1]["step"]
    assert last == max(losses, key=losses.get) + 2 < 8
    assert stopped.json("05_train/trained.json")["step"] == last   # without load_best_model_at_end
    killed.chdir(killed.folder)
    fork("05_train", "run", before=stop_at(golden, "fingerprint", 1)).wait()
    killed("05_train")                                             # nothing is left to train
    assert left_by(killed) == left_by(stopped)


def test_a_metric_that_no_evaluation_has_is_refused_at_the_first_one(make):
    run = make(metric_for_best_model="rouge")
    with pytest.raises(StageError, match="metric_for_best_model: rouge is no evaluation's figure") as caught:
        run("05_train")
    assert "eval_loss" in caught.value.fix

"""05 on two ranks (gloo) is 05 on one: same losses, same decisions, and none waits for one that is gone."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from lib import checkpoint, parallel, stage
from lib.parallel import World, buckets
from tests import harness
from tests.runner import Run, colour_rows, fork, ranks, row, text_rows
from tests.test_resume import after_two, stop_at

TWO = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}    # on two ranks: 4 samples a step
ONE = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}    # on one rank: 4 samples a step
MIXED = [*colour_rows(4), *text_rows(3)]


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run in a folder of its own, with 04_lora finished."""
    def make(rows=None, **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Run(folder, monkeypatch, zoo("llava"), rows, **knobs).upto("04_lora")
    return make


def train_on_two(run, *words, before=lambda: None):
    """What both ranks did, in the run's folder."""
    run.chdir(run.folder)
    return ranks(2, "05_train", "run", *words, before=before)


def assert_trained(children):
    assert [child.code for child in children] == [0, 0], children[0].said + children[1].said


def assert_same(one, two):
    """Nothing; two trainings have the same figures and weights, but for the order of additions."""
    ours, theirs = one.metrics(), two.metrics()
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=2e-5, abs=1e-7)
    name = "05_train/adapter/adapter_model.safetensors"
    mine, other = load_file(one.path / name), load_file(two.path / name)
    assert all(torch.allclose(mine[key], other[key], rtol=1e-3, atol=1e-5) for key in mine | other)


# ---- the same training ----

@pytest.mark.parametrize("case, rows, knobs", [
    ("pictures on some ranks only, unequal lengths", MIXED, {"num_epochs": 2}),
    ("a last step with fewer samples than ranks", colour_rows(5), {"val_set_size": 0, "num_epochs": 2}),
    ("a single held-out sample", colour_rows(5), {"val_set_size": 1}),
    # Its last step has no picture at all. Adam would make full steps of mere rounding, but for its epsilon.
    ("an adapter on the tower", MIXED, {"lora_target_roles": ["language", "vision"], "adam_epsilon": 1e-4}),
])
def test_two_ranks_train_as_one_does(case, rows, knobs, make):
    one, two = make(rows, **ONE, **knobs), make(rows, **TWO, **knobs)
    one("05_train")
    assert_trained(train_on_two(two))
    assert_same(one, two)


def test_only_the_first_rank_speaks_and_writes(make):
    run = make(**TWO)
    first, second = train_on_two(run)
    assert "05_train finished" in first.said and second.said == ""
    assert len(run.losses()) == 2                                  # one line a step, not two


def test_gradients_are_summed_in_buckets_and_absent_ones_count_as_zeros(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 6)
    sizes = [2, 4, 1, 9, 3, 3]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    assert [[p.numel() for p in bucket] for bucket in buckets(parameters)] == [[2, 4], [1], [9], [3, 3]]
    assert list(buckets([])) == []
    World(0, 1, torch.device("cpu")).sum_gradients(parameters)     # alone, too: or Adam would pass over them
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_check_runs_on_two_ranks_and_writes_nothing(make):
    run = make(lora_target_roles=["language", "head"], lora_r=8, **TWO)
    before = harness.contents(run.folder)
    first, second = train_on_two(run, "--check")
    assert_trained([first, second])
    assert "labels, gradients and optimizer work together" in first.said and second.said == ""
    assert harness.contents(run.folder) == before


# ---- the same decisions ----

def test_both_ranks_skip_what_is_up_to_date(make):
    run = make(**TWO)
    assert_trained(train_on_two(run))
    before = (run.path / "05_train/stage.json").read_bytes()
    first, second = train_on_two(run)
    assert_trained([first, second])
    assert "05_train is up to date" in first.said and second.said == ""
    assert (run.path / "05_train/stage.json").read_bytes() == before


def test_both_ranks_refuse_and_one_says_why(make):
    run = make(**TWO)
    (run.path / "04_lora/adapter.json").write_text("{}", encoding="utf-8")
    first, second = train_on_two(run)
    assert first.code == 1 and second.code in (1, -signal.SIGTERM)
    assert first.said.count("error: ") == 1 and "04_lora" in first.said and second.said == ""


def test_a_missing_run_folder_ends_both_ranks(make):
    run = make(**TWO)
    run.chdir(run.folder)
    first, second = ranks(2, "05_train", "nowhere")
    assert first.code == 1 and second.code in (1, -signal.SIGTERM)
    assert "nowhere, given on the command line, is no run folder" in first.said and second.said == ""


def test_what_never_gets_a_gradient_stops_both_ranks_and_one_says_so(make):
    run = make(text_rows(), lora_target_roles=["language", "vision"], **TWO)
    first, second = train_on_two(run)
    assert first.code == 1 and second.code in (1, -signal.SIGTERM)
    assert "got no gradient in two steps" in first.said and second.said == ""


def test_a_full_disk_on_the_first_rank_ends_both(make):
    run = make(**TWO)

    def full():
        raise OSError(28, "No space left on device")
    first, second = train_on_two(run, before=stop_at(checkpoint, "save_file", 1, how=full))
    assert first.code == 1 and "no space left" in first.said
    assert second.code in (1, -signal.SIGTERM) and "Traceback" not in second.said


def test_a_rank_whose_samples_are_odd_says_so_and_ends_both(make):
    run = make(**TWO)

    def odd():
        from lib.sampler import Samples
        original = Samples.__post_init__

        def shifted(self):
            original(self)
            if os.environ["RANK"] == "1":
                self.input_tokens = [tokens + 1 for tokens in self.input_tokens]
        Samples.__post_init__ = shifted
    first, second = train_on_two(run, before=odd)
    assert second.code == 1 and "02 measured" in second.said
    assert first.code in (1, -signal.SIGTERM) and "Traceback" not in first.said


# ---- resuming ----

@pytest.mark.parametrize("number", [1, 2])
def test_a_training_killed_on_two_ranks_goes_on_on_any_number(number, make):
    knobs = {"num_epochs": 2, "save_steps": 1}
    whole, killed = make(MIXED, **TWO, **knobs), make(MIXED, **TWO, **knobs)
    assert_trained(train_on_two(whole))
    train_on_two(killed, before=after_two())
    partial = killed.path / "05_train.partial"
    assert stage.newest_checkpoint(partial).name == "step-2"
    state = checkpoint.read_state(partial / "checkpoints/step-2")
    assert (state["step"], state["global_batch_size"], state["world_size"]) == (2, 4, 2)
    if number == 2:
        assert_trained(train_on_two(killed))
        assert killed.metrics() == whole.metrics()                 # to the byte
    else:
        killed("05_train")                                         # the same 4 samples a step, by one rank
        assert_same(whole, killed)


# ---- torchrun itself ----

def test_torchrun_leaves_every_flag_of_05_to_05(script):
    from lib import stage
    flags = ["--check", "--resume", "--force", "--help"]
    documented = set(stage.arguments(script("05_train").__doc__)._option_string_actions) - {"-h"}
    assert documented | {"--check", "--resume"} == set(flags)
    for flag in flags:
        for words in ([flag], ["runs/demo", flag], [flag, "runs/demo"]):
            given = ["--standalone", "--nproc-per-node", "2", "05_train.py", *words]
            args = get_args_parser().parse_args(given)
            assert (args.training_script, args.training_script_args) == ("05_train.py", words)


def test_bare_torchrun_trains_the_run_that_runs_latest_names(make):
    one, two = make(MIXED, **ONE), make(MIXED, **TWO)
    one("05_train")
    assert (two.folder / "runs/latest").read_text(encoding="utf-8").strip() == "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               stage.ROOT / "05_train.py"]
    done = subprocess.run(command, cwd=two.folder, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "05_train finished" in done.stdout and "next: python 06_save.py run" in done.stdout
    assert_same(one, two)


def test_a_child_that_is_forked_runs_like_a_process_of_its_own(make):
    run = make([row("Why?", "because")] * 6)
    assert fork("05_train", "run").wait().code == 0
    assert json.loads((run.path / "05_train/stage.json").read_text(encoding="utf-8"))["stage"] == "05_train"

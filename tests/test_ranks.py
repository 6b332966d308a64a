"""05 on several ranks (gloo) is 05 on one: same losses, same decisions, and none waits for one that is gone."""

import importlib
import os
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from lib.fast import store
from lib.run import folder, stage
from lib.training import checkpoint, parallel, steps
from lib.training.parallel import World, buckets
from tests import harness
from tests.runner import assert_trained, child_of, colour_rows, ranks, row, text_rows, torchrun
from tests.test_resume import after_two, die, stop_at

TWO = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}    # on two ranks: 4 samples a step
ONE = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}    # on one rank: 4 samples a step
MIXED = [*colour_rows(4), *text_rows(3)]


@pytest.fixture
def make(make_run):
    """A function: rows and knobs -> a run in a folder of its own, with 04_lora finished."""
    return partial(make_run, "llava")


def train_on(number, run, *words, before=lambda: None):
    """What so many ranks did, in the run's folder."""
    run.chdir(run.folder)
    return ranks(number, "05_train", "run", *words, before=before)


def on_nodes(number, run, before=lambda: None):
    """What torchrun said on so many nodes, each with one rank, in the run's folder."""
    run.chdir(run.folder)
    return [agent.wait() for agent in torchrun(number, "05_train", "run", before=before)]


def on_rank(number, prepare):
    """The function for forked processes, for one rank only."""
    return lambda: os.environ["RANK"] == str(number) and prepare()


def assert_same(one, two):
    """Assert that two trainings have the same figures and weights, but for the order of additions."""
    ours, theirs = one.metrics(), two.metrics()
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)
    name = "05_train/adapter/adapter_model.safetensors"
    mine, other = load_file(one.path / name), load_file(two.path / name)
    assert all(torch.allclose(mine[key], other[key], rtol=1e-3, atol=1e-5) for key in mine | other)


# ---- the same training ----

@pytest.mark.parametrize("case, number, rows, knobs", [
    ("pictures on some ranks only, unequal lengths", 4, MIXED, {"gradient_accumulation_steps": 1}),
    ("a last step with fewer samples than ranks", 2, colour_rows(5), {"val_set_size": 0}),
    ("a single held-out sample", 2, colour_rows(5), {"val_set_size": 1, "num_epochs": 1}),
    # Its last step has no picture at all. Adam would make full steps of mere rounding, but for its epsilon.
    ("an adapter on the tower", 2, MIXED, {"lora_target_roles": ["language", "vision"], "adam_epsilon": 1e-4}),
])
def test_ranks_train_as_one_does(case, number, rows, knobs, make):
    one, many = (make(rows, **{"num_epochs": 2} | knobs | cut) for cut in (ONE, TWO | knobs))
    one("05_train")
    assert_trained(train_on(number, many))
    assert_same(one, many)


def test_only_the_first_rank_speaks_and_writes(make):
    run = make(**TWO)
    first, second = train_on(2, run)
    assert "05_train finished" in first.said and second.said == ""
    assert len(run.losses()) == 2                                  # one line a step, not two


def test_gradients_are_summed_in_buckets_and_one_rank_leaves_absent_ones_absent(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 6)
    sizes = [2, 4, 1, 9, 3, 3]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    assert [[p.numel() for p in bucket] for bucket in buckets(parameters)] == [[2, 4], [1], [9], [3, 3]]
    assert list(buckets([])) == []
    World(0, 1, torch.device("cpu")).sum_gradients(parameters, some_lack=True)
    assert all(p.grad is None for p in parameters)


def test_what_no_rank_has_a_gradient_for_stays_without_one_and_else_some_ranks_add_zeros(tmp_path):
    def train(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
        one, two, three = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
        one.grad = torch.full((2,), 1.0 + rank)
        three.grad = torch.ones(2) if rank else None
        World(rank, 2, torch.device("cpu")).sum_gradients([one, two, three], some_lack=True)
        assert one.grad.tolist() == [3, 3] and two.grad is None and three.grad.tolist() == [1, 1]
    children = [child_of(partial(train, rank)) for rank in range(2)]
    assert [child.wait().code for child in children] == [0, 0], [child.said for child in children]


def test_check_runs_on_two_ranks_and_writes_nothing(make):
    run = make(lora_target_roles=["language", "head"], lora_r=8, **TWO)
    before = harness.contents(run.folder)
    first, second = train_on(2, run, "--check")
    assert_trained([first, second])
    assert "labels, gradients and optimizer work together" in first.said and second.said == ""
    assert harness.contents(run.folder) == before


# ---- the same decisions ----

def test_both_ranks_skip_what_is_up_to_date(make):
    run = make(**TWO)
    assert_trained(train_on(2, run))
    before = (run.path / "05_train/stage.json").read_bytes()
    first, second = train_on(2, run)
    assert_trained([first, second])
    assert "05_train is up to date" in first.said and second.said == ""
    assert (run.path / "05_train/stage.json").read_bytes() == before


def test_both_ranks_refuse_and_one_says_why(make):
    run = make(**TWO)
    (run.path / "04_lora/adapter.json").write_text("{}", encoding="utf-8")
    first, second = train_on(2, run)
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
    first, second = train_on(2, run)
    assert first.code == 1 and second.code in (1, -signal.SIGTERM)
    assert "got no gradient in two steps" in first.said and second.said == ""


def test_a_full_disk_on_the_first_rank_ends_both(make):
    run = make(**TWO)

    def full():
        raise OSError(28, "No space left on device")
    first, second = train_on(2, run, before=stop_at(checkpoint, "save_file", 1, how=full))
    assert first.code == 1 and "no space left" in first.said
    assert second.code in (1, -signal.SIGTERM) and "Traceback" not in second.said


def test_a_rank_whose_samples_are_odd_says_so_and_ends_both(make):
    run = make(**TWO)

    def odd():
        from lib.batches.sampler import Samples
        original = Samples.__post_init__

        def shifted(self):
            original(self)
            if os.environ["RANK"] == "1":
                self.input_tokens = [tokens + 1 for tokens in self.input_tokens]
        Samples.__post_init__ = shifted
    first, second = train_on(2, run, before=odd)
    assert second.code == 1 and "02 measured" in second.said
    assert first.code in (1, -signal.SIGTERM) and "Traceback" not in first.said


# ---- resuming ----

def test_a_training_killed_on_two_ranks_goes_on_to_the_byte(make):
    whole, killed = (make(MIXED, num_epochs=2, save_steps=1, **TWO) for _ in range(2))
    assert_trained(train_on(2, whole))
    train_on(2, killed, before=after_two())
    partial = killed.path / "05_train.partial"
    assert folder.newest_checkpoint(partial).name == "step-2"
    assert checkpoint.read_state(partial / "checkpoints/step-2") == {
        "step": 2, "global_batch_size": 4, "per_rank": 2, "scaler": {}, "groups": []}
    assert_trained(train_on(2, killed))
    assert killed.metrics() == whole.metrics()


def test_a_training_goes_from_two_ranks_to_one_and_back(make):
    one, many = make(MIXED, num_epochs=3, **ONE), make(MIXED, num_epochs=3, save_steps=1, **TWO)
    one("05_train")
    train_on(2, many, before=after_two())
    child, = train_on(1, many, before=after_two())                 # the same 4 samples a step
    assert folder.newest_checkpoint(many.path / "05_train.partial").name == "step-4", child.said
    leader, other = train_on(2, many)
    assert_trained([leader, other])
    assert "goes on from" in leader.said
    assert_same(one, many)


# ---- vision features ----

def test_ranks_keep_each_pictures_features_once_also_where_one_dies(make):
    rows = [*MIXED, row("Is it dark?", "no", "red.png"), row("Is it dark?", "yes", "blue.png")]
    one, two = make(rows, **ONE), make(rows, cache_vision_features=True, **TWO)
    one("05_train")

    def late():                                                    # the other has begun to write
        train = importlib.import_module("05_train")
        original = train.keep_features
        train.keep_features = lambda run: (time.sleep(0.5), original(run))

    def noted():
        original = store.write

        def write(tensors, path):
            original(tensors, path)
            with (two.folder / f"by {os.environ['RANK']}").open("a", encoding="utf-8") as file:
                file.write(f"{path.parent.name}/{path.name}\n")
        store.write = write
        on_rank(1, late)()
    dies = on_rank(1, stop_at(store, "save_file", 3))
    leader, other = on_nodes(2, two, lambda: (noted(), dies()))
    assert "error: rank 0 of 2 has lost another rank before the first step" in leader.said.splitlines()
    assert "exitcode  : -9 " in other.said
    assert_trained(train_on(2, two, before=noted))
    by = [(two.folder / f"by {rank}").read_text(encoding="utf-8").split() for rank in (0, 1)]
    files = sorted(path.relative_to(two.path / "features").as_posix() for path in two.path.glob("features/*/*"))
    assert sorted(by[0] + by[1]) == files and all(by) and sum("pictures" in name for name in files) == 4
    assert_same(one, two)


# ---- torchrun itself ----

def test_torchrun_leaves_every_flag_of_05_to_05():
    from lib.run import stage
    flags = ["--check", "--resume", "--force", "--help"]
    documented = set(stage.arguments(importlib.import_module("05_train").__doc__)._option_string_actions) - {"-h"}
    assert documented | {"--check", "--resume"} == set(flags)
    for flag in flags:
        for words in ([flag], ["runs/demo", flag], [flag, "runs/demo"]):
            given = ["--standalone", "--nproc-per-node", "2", "05_train.py", *words]
            args = get_args_parser().parse_args(given)
            assert (args.training_script, args.training_script_args) == ("05_train.py", words)


def test_bare_torchrun_trains_the_run_that_runs_latest_names(make):
    from torch.distributed import run as torchrun
    one, two = make(MIXED, **ONE), make(MIXED, **TWO)
    one("05_train")
    assert (two.folder / "runs/latest").read_text(encoding="utf-8").strip() == "run"
    said, given = two.folder / "said", ["--standalone", "--nproc-per-node", "2", str(stage.ROOT / "05_train.py")]

    two.chdir(two.folder)

    def launch():                                                  # its ranks are processes with a Python of their own
        with said.open("w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        torchrun.main(given)
    assert child_of(launch).wait().code == 0, said.read_text(encoding="utf-8")
    assert "05_train finished" in said.read_text(encoding="utf-8")
    assert f"next: python {stage.ROOT / '06_save.py'} run" in said.read_text(encoding="utf-8")
    assert_same(one, two)


def at_step(number, how=die):
    """The function for forked processes: there, `how` happens before the given step of this start."""
    return stop_at(importlib.import_module("05_train"), "optimizer_step", number, how)


def ask(sign):
    """The function that asks torchrun to stop, as whoever ends a job does."""
    return lambda: os.kill(os.getppid(), sign)


@pytest.mark.parametrize("late", [0, 1])
def test_a_signal_to_one_of_two_nodes_stops_both_after_the_step_and_they_go_on(late, make, monkeypatch):
    monkeypatch.setitem(steps.LATE, "cpu", late)                   # as on GPUs, where a step more is under way
    one, two = make(MIXED, num_epochs=3, **ONE), make(MIXED, num_epochs=3, saves_per_epoch=0, **TWO)
    one("05_train")
    for step, (sign, code) in zip((1 + late, 2 + 2 * late), ((signal.SIGTERM, 143), (signal.SIGINT, 130))):
        first, _ = on_nodes(2, two, on_rank(1, at_step(1, ask(sign))))
        assert folder.newest_checkpoint(two.path / "05_train.partial").name == f"step-{step}"
        assert f"error: 05_train interrupted: step-{step} is kept" in first.said.splitlines()
        assert f"exitcode  : {code} " in first.said
    assert_trained(on_nodes(2, two))
    assert_same(one, two)


def test_when_a_rank_dies_each_other_one_says_so_and_the_same_command_goes_on(make):
    cut = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    one, four = make(MIXED, num_epochs=2, **ONE), make(MIXED, num_epochs=2, save_steps=1, **cut)
    one("05_train")
    agents = on_nodes(4, four, on_rank(2, at_step(3)))
    assert "exitcode  : -9 " in agents[2].said
    for rank in (0, 1, 3):
        said = agents[rank].said.splitlines()
        assert said.count(f"error: rank {rank} of 4 has lost another rank in step 3") == 1, agents[rank].said
        assert "exitcode  : 1 " in agents[rank].said and str(stage.ROOT / "lib") not in agents[rank].said
    assert_trained(on_nodes(4, four))
    assert_same(one, four)

"""Under FSDP2 two ranks train as one does, each with a part of the base."""
import re

import pytest

from tests.runner import Run, colour_rows, fork, ranks, text_rows
from tests.test_ranks import ONE, TWO, assert_same

MIXED = [*colour_rows(4), *text_rows(3)]


def assert_trained(children):
    assert all(child.code == 0 for child in children), "".join(child.said for child in children)


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: a variant and knobs -> a run in a folder of its own, with 04_lora finished."""
    def make(name, **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Run(folder, monkeypatch, zoo(name), MIXED, num_epochs=2, **knobs).upto("04_lora")
    return make


def train_on_one(run):
    run.chdir(run.folder)
    return fork("05_train", "run").wait()        # in a process of its own: after a backward here, none can be forked


def train_on_two(run):
    run.chdir(run.folder)
    return ranks(2, "05_train", "run")


@pytest.mark.parametrize("name, knobs", [
    ("llava", {"tokens": ["colour", "number"]}), ("qwen2_5_vl", {"sample_packing": True, "sequence_len": 220}), ("qwen3_vl_moe", {})])
def test_a_sharded_base_trains_as_a_whole_one(name, knobs, make):
    one, two = make(name, **ONE, **knobs), make(name, fsdp_version=2, **TWO, **knobs)
    assert_trained([train_on_one(one)])
    leader, other = train_on_two(two)
    assert_trained([leader, other])
    assert_same(one, two)
    here, every = map(float, re.search(r"sharded over 2 ranks: ([\d.]+) of ([\d.]+) MiB", leader.said).groups())
    assert 0 < here <= 0.51 * every


def test_an_export_of_a_sharded_run_is_proved_by_a_process_without_shards(make):
    run = make("llava", fsdp_version=2, tokens=["colour"], **TWO)
    assert_trained(train_on_two(run))
    run("06_save")
    assert run.json("06_save/check.json")["exports"]["adapter"]["max_logit_difference"] < 1e-4


def test_a_resumed_run_may_have_another_layout(make):
    whole, cut = make("llava", **ONE), make("llava", fsdp_version=2, save_steps=1, **TWO)
    assert_trained([train_on_one(whole)])
    assert_trained(train_on_two(cut))
    assert_same(whole, cut)

"""Under FSDP2 ranks train as one does, each with a part of the base."""
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from lib.models import model
from lib.run import folder
from lib.training import checkpoint
from tests.runner import assert_trained, colour_rows, ranks, text_rows
from tests.test_ranks import ONE, TWO, assert_same
from tests.test_resume import stop_at
from tests.test_six_scripts import prove_in_this_process

MIXED = [*colour_rows(4), *text_rows(3)]
BY_ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 4}
FOUR = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}    # as BY_ONE, on four ranks
PACKED = {"sample_packing": True, "sequence_len": 220}


@pytest.fixture
def make(make_run):
    """A function: a variant and knobs -> a run in a folder of its own, with 04_lora finished."""
    return partial(make_run, rows=MIXED, num_epochs=2)


def train_on(number, run, **more):
    """What so many ranks did; one, too, is a process of its own: after a backward here, none can be forked."""
    run.chdir(run.folder)
    return ranks(number, "05_train", "run", **more)


@pytest.mark.parametrize("name, dtype, one, cut, knobs", [
    ("llava", "bfloat16", BY_ONE, FOUR, {"bf16": True}),
    ("llava", "bfloat16", BY_ONE, FOUR, {"bf16": True, "adapter": "qlora"}),     # nf4
    ("qwen2_5_vl", "float32", ONE, TWO, PACKED),
    ("qwen3_vl_moe", "float32", ONE, TWO, {}),
    ("llava", "float32", ONE, TWO, {"tokens": ["colour", "number"]}),            # rows that train
    ("qwen3_vl", "float32", BY_ONE, FOUR, {"lora_target_roles": ["vision"]}),    # some ranks have no picture
])
def test_a_sharded_base_trains_as_a_whole_one(name, dtype, one, cut, knobs, make):
    whole, parts = make(name, dtype=dtype, **one, **knobs), make(name, dtype=dtype, fsdp_version=2, **cut, **knobs)
    assert_trained(train_on(1, whole))
    children = train_on(4 // cut["gradient_accumulation_steps"], parts)
    assert_trained(children)
    assert_same(whole, parts)
    found = re.search(r"sharded over (\d) ranks: ([\d.]+) of ([\d.]+) MiB", children[0].said)
    number, here, every = map(float, found.groups())
    assert number == len(children) and 0 < here <= every / number + 0.01


def test_a_sharded_and_packed_training_goes_from_two_ranks_to_one_and_back(make, monkeypatch):
    knobs = {"num_epochs": 3, **PACKED}                            # of a step each
    whole, many = make("qwen2_5_vl", **ONE, **knobs), make("qwen2_5_vl", fsdp_version=2, save_steps=1, **TWO, **knobs)
    assert_trained(train_on(1, whole))
    for number, last in ((2, "step-1"), (1, "step-2")):
        child = train_on(number, many, before=stop_at(checkpoint, "moments", 2))[0]
        assert folder.newest_checkpoint(many.path / "05_train.partial").name == last, child.said
    assert_trained(train_on(2, many))
    assert_same(whole, many)
    monkeypatch.setattr(subprocess, "run", prove_in_this_process)  # which has no shards
    many("06_save")
    assert many.json("06_save/check.json")["exports"]["adapter"]["max_logit_difference"] < 1e-4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps to look at")
def test_weights_of_their_own_type_are_mapped_from_the_files_and_not_copied(make):
    plan = make("llava", dtype="bfloat16", bf16=True).json("03_load_model/model.json")
    for dtype, is_mapped in (("bfloat16", True), ("float32", False)):
        net = model.load(plan | {"dtype": dtype}, torch.device("cpu"))
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        places = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
        spans = [range(int(start, 16), int(end, 16)) for start, end in places]
        assert {any(p.data_ptr() in span for span in spans) for p in net.parameters()} == {is_mapped}

"""The bench builds what it says, counts FLOPs and memory right, and reports nothing where losses disagree."""
import contextlib
import functools
import importlib
import json
import mmap
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import accuracy, against_trl, collate, cost, gpu, load, machine, ours, prepare, real, shapes
from lib.batches.sampler import Batcher
from lib.models.roles import Roles
from lib.run.errors import StageError

ROOT = Path(__file__).resolve().parent.parent
DATA = {"sizes": "tiny", "rows": 8, "mixed": True}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A function: a family's name -> the folder that bench/prepare.py makes for it."""
    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp("bench") / family
        prepare.prepare(folder, {"family": family, **DATA}, {"ours": {}})
        return folder
    return make


def test_the_most_memory_of_a_load_and_what_it_keeps_are_told_apart():
    def pages(size: int) -> mmap.mmap:              # malloc may hand out what this process has freed and kept
        found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        found[::mmap.PAGESIZE] = b"\1" * (size // mmap.PAGESIZE)
        return found
    with load.Memory() as memory:
        passing, kept = pages(2**27), pages(2**25)
        time.sleep(0.5)
        passing.close()
    assert memory.most > 2**27 > 2**26 > memory.kept > len(kept) * 0.9     # the rest of the process moves, too


def test_the_shape_has_the_parameters_that_its_name_says():
    model = importlib.import_module("transformers").Qwen2VLForConditionalGeneration
    with torch.device("meta"):
        net = model(shapes.qwen2_vl(shapes.SIZES["70m"]).config)
    assert sum(p.numel() for p in net.parameters()) == 70_090_240


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_every_shape_trains_by_05s_own_step(family, prepared, tmp_path):
    with contextlib.chdir(prepared(family)):
        ours.main("ours", str(tmp_path / "out.json"), "2")
    steps = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["steps"]
    assert len(steps) == 2
    assert all(step["seconds"] > 0 and 4 < step["loss"] < 10 and step["tokens"] > 0 for step in steps)


def test_the_other_side_is_handed_the_batches_that_05_trains_on(prepared):
    with contextlib.chdir(prepared("qwen2_vl")):
        train, run = prepare.loaded(Path("ours"))
        batches = list(train.micro_batches(run))
        files = prepare.batch_files(Path("batches"))
        assert [len(step) for step in files] == [2, 2]
        for batch, path in zip(batches, [path for step in files for path in step], strict=True):
            handed = prepare.read(path)
            wanted = prepare.shortest(batch)
            assert handed.keys() == batch.keys()
            assert all(torch.equal(handed[key], wanted[key]) for key in batch)
            assert handed["attention_mask"].sum() == batch["attention_mask"].sum()


def test_needed_flops_equal_a_count_by_hand(prepared):
    with contextlib.chdir(prepared("qwen2_vl")):
        train, run = prepare.loaded(Path("ours"))
        batch = next(train.micro_batches(run))
        plan = json.loads((run.work.input("03_load_model") / "model.json").read_text(encoding="utf-8"))
        found = machine.products(run.model, Roles.of_plan(plan), batch, {"language"})
    size, tokens, patches = shapes.SIZES["tiny"], batch["input_ids"].numel(), len(batch["pixel_values"])
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128             # q, k and v, o, the MLP
    block = 32 * 96 + 32 * 32 + 2 * 32 * 128                           # qkv, proj, the MLP
    patch, merger = 3 * 2 * 14 * 14 * 32, 128 * 128 + 128 * 64
    assert (size.layers, size.tower_layers, size.vocabulary) == (2, 2, 512)
    assert machine.flops(found) == (4 * tokens * 2 * layer + 2 * patches * (2 * block + patch)
                                    + 2 * (patches // 4) * merger + 4 * len(batch["targets"]) * 64 * 512)


def test_a_forward_that_counts_leaves_no_hook_behind(prepared):
    with contextlib.chdir(prepared("qwen2_vl")):
        train, run = prepare.loaded(Path("ours"))
        machine.products(run.model, Roles({"": "language"}), next(train.micro_batches(run)), set())
    assert not any(module._forward_hooks for module in run.model.modules())


def test_peak_memory_is_what_a_step_took_for_a_moment():
    meter = machine.Meter(torch.device("cpu"))
    meter.step(seconds=1.0)
    torch.ones(64 * 2**18).sum()                                       # 64 MiB, freed at once
    meter.step(seconds=1.0)
    assert 60 < meter.result()["peak_bytes"] / 2**20 < 80


def test_the_machines_rate_is_measured_on_the_steps_own_products():
    found = Counter({machine.Product(64, 32, 16, 2, "language"): 3, machine.Product(8, 8, 8, 1, "vision"): 1})
    assert machine.flops(found) == 3 * 2 * 2 * 64 * 32 * 16 + 2 * 8 * 8 * 8
    assert machine.matrix_rate(found, torch.device("cpu"), torch.bfloat16, seconds=0.01) > 0


# ---- the comparison ----

def steps_of(losses, norms=(1.0, 1.0)):
    return [{"loss": loss, "grad_norm": norm, "tokens": tokens, "seconds": 1.0}
            for loss, norm, tokens in zip(losses, norms, (10, 30))]


def case(**more):
    return against_trl.Case("here", "a case", {}, {"ours": {}}, {"TRL": {}}, **more)


def refused(given, ours_steps, trl_steps):
    results = {"ours": [{"steps": steps_of(*ours_steps)}], "TRL": [{"steps": steps_of(*trl_steps)}]}
    try:
        against_trl.refuse(given, results)
    except StageError as error:
        return error.what
    return None


@pytest.mark.parametrize("ours_steps, said", [
    (([2.0, 1.0],), None),
    (([2.0, 1.0009],), None),
    (([2.0, 1.002],), "the loss of step 2"),
    (([float("nan"), 1.0],), "the loss of step 1"),
    (([2.0],), "the number of steps"),
    (([2.0, 1.0], (1.0, 1.02)), "the gradient norm of step 2"),
])
def test_nothing_is_reported_where_steps_disagree(ours_steps, said):
    what = refused(case(), ours_steps, ([2.0, 1.0],))
    assert what is None if said is None else said in what and "of ours" in what


def test_packed_epochs_are_compared_by_their_loss_per_token():
    given = case(compare="epoch", agree=0.01)
    assert against_trl.epochs(steps_of([2.0, 1.0]), 1) == [1.25]       # 10 tokens and 30
    assert refused(given, ([1.25, 1.25],), ([2.0, 1.0],)) is None
    assert "epoch 1" in refused(given, ([1.5, 1.5],), ([2.0, 1.0],))


def test_an_evaluation_comes_after_all_that_was_trained_and_kept_before_it():
    step = {"seconds": 1.0, "cpu_seconds": 0.5}
    result = {"steps": [step] * 3, "before_seconds": 4.0, "before_cpu_seconds": 3.0}
    assert accuracy.evaluation(result, 2, 0.9) == {"step": 2, "accuracy": 0.9, "seconds": 6.0,
                                                   "cpu_seconds": 4.0}


def test_time_to_accuracy_ends_with_the_first_evaluation_that_is_as_good_as_trls_last():
    found = (0.5, 1.0), (0.9, 2.0), (0.95, 3.0)
    run = [{"accuracy": right, "seconds": seconds} for right, seconds in found]
    for reached, said in ((0.9, "0.50"), (0.91, "0.75"), (0.96, "never")):
        trl = {"accuracy": reached, "seconds": 4.0}
        assert accuracy.part(accuracy.first(run, trl), trl, "seconds") == said


def test_a_cost_that_doubles_with_its_number_grows_by_an_exponent_of_one():
    measured = (0, 1.0), (2, 3.0), (4, 6.0), (8, 24.0)
    points = [{"batch": batch, "seconds": seconds} for batch, seconds in measured]
    pairs = zip([None, *points], points)
    assert [cost.exponent(before, point, "batch", "seconds") for before, point in pairs] == [
        "", "", "1.00", "2.00"]


def test_only_one_file_imports_trl():
    texts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    texts |= {path.name: path.read_text(encoding="utf-8") for name in ("lib", "bench")
              for path in (ROOT / name).rglob("*.py")}
    found = [name for name, text in texts.items() if re.search(r"^\s*(import|from) trl\b", text, re.M)]
    assert found == ["trl_side.py"]


def test_both_sides_have_the_same_libraries():
    lines = (ROOT / "requirements-bench.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[0] != "#"] == ["-r requirements.txt", "trl==1.16.0"]


# ---- real sizes ----

PARAMETERS = {"Qwen2.5-VL-3B": 3.75, "SmolVLM2-2.2B": 2.25, "Gemma-3-4B": 4.30, "Qwen2.5-VL-7B": 8.29}  # 1e9


@pytest.mark.parametrize("name", real.MODELS)
def test_real_sizes_have_the_parameters_of_the_published_model(name):
    from lib import registry
    config = real.configuration(name, tiny=False)
    with torch.device("meta"):
        net = registry.model_class(config, None)(config)
    assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "SmolVLM2-2.2B", "Gemma-3-4B"])
def test_a_gpu_case_runs_at_tiny_sizes_and_packing_changes_no_loss(name):
    alone, packed = (gpu.measure(name, "lora", side, tiny=True) for side in ("ours", "ours packed"))
    assert alone["losses"] == pytest.approx(packed["losses"], rel=1e-3)
    assert alone["flops"] == packed["flops"] > 0
    assert min(alone["seconds"], alone["mfu"], alone["tokens_per_second"]) > 0


def test_a_gpu_case_in_4_bits_keeps_tower_and_head_whole():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found = gpu.measure("Qwen2.5-VL-3B", "qlora", "ours", tiny=True)
    assert all(4 < loss < 10 for loss in found["losses"])
    layer = gpu.in_4_bits(torch.nn.Linear(64, 64, dtype=torch.bfloat16), torch.device("cpu"))
    assert isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.weight.quant_state is not None


def test_a_gpu_case_that_fails_is_reported_and_one_over_the_budget_is_skipped(tmp_path):
    def apart(model):
        return gpu.Apart(["--case", model, "lora", "ours"], True, tmp_path / model)
    assert "KeyError" in apart("no-such-model").result(120)["failed"]
    assert "budget" in apart("Qwen2.5-VL-3B").result(3)["skipped"]


def test_no_ratio_is_given_where_gpu_losses_differ():
    def side(loss):
        return {"seconds": 1.0, "tokens_per_second": 100.0, "peak_gib": 2.0, "losses": [loss]}
    losses = {"ours": 1.0, "TRL": 1.0, "ours packed": 1.1}
    cases = {f"M | lora | {name}": side(loss) for name, loss in losses.items()}
    assert gpu.ratios(cases) == ["M | lora | ours / TRL: time 1.00, peak 1.00",
                                 "M | lora | ours packed / TRL: no ratio, since losses differ by 10.0%"]


def test_encoding_and_collating_have_a_share_of_a_step(tmp_path, capsys):
    collate.main([str(tmp_path / "collate"), "--sizes", "tiny", "--steps", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["encoding", "collating", "training"] and min(found.values()) > 0


def test_the_other_side_gets_batches_as_long_as_their_longest_row():
    rows = [{"input_ids": torch.arange(tokens)[None], "attention_mask": torch.ones(1, tokens, dtype=torch.long),
             "labels": torch.arange(tokens)[None], "pixel_values": torch.ones(40, 20)} for tokens in (9, 4)]
    batch = Batcher(0, "cat")(rows)
    cut = prepare.shortest(batch)
    assert batch["input_ids"].shape == (2, 16) and cut["input_ids"].shape == (2, 9)
    assert torch.equal(cut["labels"], batch["labels"][:, :9]) and cut["pixel_values"] is batch["pixel_values"]
    assert torch.equal(cut["labels"].flatten()[cut["positions"] + 1], cut["targets"])

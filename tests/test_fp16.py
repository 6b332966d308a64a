"""float16 on cards without bfloat16: losses are scaled, and a step whose gradients overflow is left out by all."""
import json
import signal

import pytest
from safetensors.torch import load_file

from lib.run.errors import StageError
from lib.training import optim
from lib.training.metrics import Log
from tests.runner import Run, colour_rows, fork, ranks, text_rows
from tests.test_resume import stop_at

KNOBS = {"num_epochs": 4, "save_steps": 1, "fp16": True, "bf16": "auto", "warmup_steps": 0}   # 8 steps


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run whose first steps overflow, in a folder of its own, with 04_lora finished."""
    monkeypatch.setattr(optim, "FIRST_SCALE", 2.0**18)

    def make(name="llava", **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Run(folder, monkeypatch, zoo(name), **KNOBS | knobs).upto("04_lora")
    return make


def steps(run):
    return [line for line in run.metrics() if "loss" in line]


def test_a_step_without_a_gradient_leaves_the_scale_as_it_is(make):
    run = make(lora_target_roles=["vision"], rows=[*text_rows(6), *colour_rows(2)], val_set_size=0, micro_batch_size=1,
               gradient_accumulation_steps=1, num_epochs=1)
    run("05_train")
    assert {line["grad_norm"] for line in steps(run)} >= {0.0}


def test_overflowing_steps_are_left_out_and_counted_until_the_scale_fits(make):
    run, exact = make(), make(fp16=False, bf16=False)
    run("05_train"), exact("05_train")
    found = steps(run)
    scales, over = [line["loss_scale"] for line in found], [line["grad_norm"] is None for line in found]
    count = sum(over)
    assert 0 < count < len(found) and over == sorted(over, reverse=True)   # the first ones
    assert scales == [2.0**18 / 2**min(number, count) for number in range(len(found))]
    assert [line["overflows"] for line in found] == [min(number + 1, count) for number in range(len(found))]
    weights = load_file(run.path / "05_train/adapter/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # Scaling is undone before the gradient is measured and clipped.
    plain = steps(exact)
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2)
    assert 0.5 < found[count]["grad_norm"] / plain[0]["grad_norm"] < 2
    assert found[-1]["loss"] < found[0]["loss"] and not any("loss_scale" in line for line in plain)


def test_a_killed_run_in_float16_goes_on_with_its_scale(make):
    whole, killed = make(), make()
    whole("05_train")
    killed.chdir(killed.folder)
    child = fork("05_train", "run", before=stop_at(Log, "step", 4)).wait()
    assert child.code == -signal.SIGKILL, child.said
    state = killed.path / "05_train.partial/checkpoints/step-3/state.json"
    assert json.loads(state.read_text(encoding="utf-8"))["scaler"]["scale"] < 2.0**18
    killed("05_train")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole.path / "05_train" / name).read_bytes() == (killed.path / "05_train" / name).read_bytes()


def test_two_ranks_agree_on_the_steps_that_are_left_out(make):
    one, two = make(), make(micro_batch_size=1)
    one("05_train")
    two.chdir(two.folder)
    children = ranks(2, "05_train", "run")
    assert [child.code for child in children] == [0, 0], children[0].said + children[1].said
    assert [line["overflows"] for line in steps(two)] == [line["overflows"] for line in steps(one)]
    assert two.losses() == pytest.approx(one.losses(), rel=2e-2)


@pytest.mark.parametrize("name", ["gemma3", "gemma3n"])
def test_a_family_that_overflows_is_refused_by_its_record(name, tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo(name), fp16=True, bf16="auto").upto("02_data")
    with pytest.raises(StageError, match="fp16: Gemma-3n? can't train in float16: its activations pass 65504"):
        run("03_load_model")

"""05 reads a step's figures while a GPU computes the next one, and does the same as if it had waited."""
import math

import pytest
import torch

from lib.training import optim, steps
from tests.runner import lines

KNOBS = {"num_epochs": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "val_set_size": 2}


def left_by(run):
    names = ("metrics.jsonl", "trained.json", "adapter/adapter_model.safetensors")
    return [(run.path / "05_train" / name).read_bytes() for name in names]


@pytest.mark.parametrize("knobs", [
    {"evals_per_epoch": 0, "saves_per_epoch": 0},
    {"eval_steps": 2, "save_steps": 3, "logging_steps": 2, "load_best_model_at_end": True},
    {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 0.5, "optimizer": "adamw_torch"}])
def test_figures_that_are_read_late_are_the_same_and_in_order(knobs, make_run, monkeypatch):
    at_once, late = (make_run("llava", **KNOBS | knobs) for _ in range(2))
    at_once("05_train")
    monkeypatch.setitem(steps.LATE, "cpu", 1)
    late("05_train")
    assert left_by(late) == left_by(at_once) and len(late.losses()) > 1
    assert all(line["seconds"] > 0 for line in lines(late.path / "05_train/timings.jsonl"))


on_gpus = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpus)])
def test_what_is_sent_is_read_as_it_was_when_it_was_sent(device):
    tensor = torch.arange(6.0, device=device).view(2, 3)
    sent = steps.Sent(tensor * 2)
    tensor.zero_()
    assert sent.read() == [[0, 2, 4], [6, 8, 10]] and steps.Sent(tensor.sum()).read() == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpus)])
@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_left_out_where_a_gradient_is_no_number(fused, device):
    parameter = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    after = []
    for gradient in (1.0, math.nan, math.inf, 2.0):
        parameter.grad = torch.full((5,), gradient, device=device)
        optim.update(optimizer, parameter.grad.isfinite().all())
        after.append([parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())])
    for one, two in zip(after[0], after[2]):                       # weights, both moments, the number of steps
        assert torch.equal(one, two)
    plain = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = torch.optim.AdamW([plain], lr=0.1, fused=fused)
    for gradient in (1.0, 2.0):
        plain.grad = torch.full((5,), gradient, device=device)
        optimizer.step()
    assert torch.equal(plain, parameter)

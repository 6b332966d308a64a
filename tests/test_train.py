"""05: the loop does what its page says: the same however samples are cut, every number it writes exact."""

import importlib
import json
import math
import random
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file

from lib.batches import sampler
from lib.batches.order import Order, balanced, dealt
from lib.batches.sampler import Samples
from lib.collator import IGNORE_INDEX
from lib.evaluation.golden import fingerprint, read_header
from lib.models import model
from lib.models.saved import attach
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.training import checkpoint, optim, rehearsal
from lib.training.metrics import sizes
from lib.training.parallel import World
from lib.training.watch import GradientWatch
from tests import harness
from tests.runner import Run, colour_rows, lines, row, text_rows

CPU = torch.device("cpu")


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run in a folder of its own, with 04_lora finished."""
    def make(name="llava", rows=None, **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        base = name if "/" in str(name) else zoo(name)
        return Run(folder, monkeypatch, base, rows, **knobs).upto("04_lora")
    return make


def trained(run):
    """The trained tensors that a run saved."""
    adapter, whole = (run.path / "05_train" / name for name in ("adapter/adapter_model", "model/model"))
    return load_file(f"{adapter}.safetensors" if adapter.parent.exists() else f"{whole}.safetensors")


def assert_same_training(one, two, tolerance=1e-5):
    """Assert that two runs had the same losses and ended with the same weights."""
    assert one.losses() == pytest.approx(two.losses(), rel=tolerance)
    ours, theirs = trained(one), trained(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=tolerance), name


def encoder_of(run):
    return Encoder.load(run.path / "02_data/processor")


def sum_of_losses(net, row):
    """(sum of token losses, supervised tokens) of one encoded row, from its full logits."""
    labels = row["labels"]
    logits = net(**{k: v for k, v in row.items() if k != "labels"}, use_cache=False).logits[:, :-1].float()
    total = F.cross_entropy(logits[0], labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
    return total, int((labels[:, 1:] != IGNORE_INDEX).sum())


# ---- the step ----

@pytest.mark.parametrize("adapter", ["lora", None])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(adapter, make):
    knobs = dict(rows=[*colour_rows(6), *text_rows(3)], adapter=adapter, num_epochs=2)
    runs = [make(micro_batch_size=size, gradient_accumulation_steps=accumulated, **knobs)
            for size, accumulated in ((4, 1), (2, 2), (1, 4))]
    for run in runs:
        run("05_train")
    assert len(runs[0].losses()) == 4                              # of 7 samples: 4 and 3, twice
    assert_same_training(runs[0], runs[1])
    assert_same_training(runs[0], runs[2])


@pytest.mark.parametrize("knobs", [{"adapter": None, "train_roles": ["projector"], "learning_rate": 1e-4},
                                   {"lora_target_roles": ["vision"]}])
def test_what_sees_pictures_trains_alone_past_micro_batches_without_one(knobs, make):
    knobs |= dict(rows=[*colour_rows(4), *text_rows(5)], num_epochs=2, val_set_size=0)
    whole, single = (make(micro_batch_size=size, gradient_accumulation_steps=accumulated, **knobs)
                     for size, accumulated in ((4, 1), (1, 4)))
    whole("05_train"), single("05_train")
    assert_same_training(whole, single)


def test_the_first_loss_and_gradient_are_of_the_sum_of_token_losses_over_the_tokens_of_the_step(make):
    run = make(num_epochs=1)
    net = model.load(run.json("03_load_model/model.json"), CPU, "train", run.path / "04_lora/adapter")
    records, encoder = load_from_disk(run.path / "02_data/train"), encoder_of(run)
    chosen = Order(records["input_tokens"], 4, seed=42).of_step(0)
    losses, tokens = map(sum, zip(*(sum_of_losses(net, encoder(records[i])) for i, in chosen)))
    (losses / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in model.trained_parameters(net).values()]).norm()
    run("05_train")
    line = run.metrics()[1]
    assert line["loss"] == pytest.approx(losses.item() / tokens, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert line["supervised_tokens"] == tokens


def test_no_sample_is_dropped_and_none_comes_twice_in_an_epoch():
    for samples, batch in ((7, 4), (8, 4), (3, 5), (1, 1)):
        order = Order([9] * samples, batch, seed=3)
        for epoch in (0, 1):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            assert sorted(index for step in steps for index, in order.of_step(step)) == list(range(samples))
    shares = dealt([(i,) for i in range(7)], 2, 3)
    assert shares == [[[(0,), (3,)], [(6,)]], [[(1,), (4,)]], [[(2,), (5,)]]]


def test_ranks_get_as_many_rows_and_of_like_cost():
    choose = random.Random(0)
    for ranks in range(1, 6):
        for _ in range(40):
            costs = [choose.randint(1, 2000) for _ in range(choose.randrange(40))]
            rows = [(index,) for index in range(len(costs))]
            shares = balanced(rows, ranks, lambda row: costs[row[0]])
            numbers, sums = [*map(len, shares)], [sum(costs[index] for index, in share) for share in shares]
            assert sorted(row for share in shares for row in share) == rows
            assert all(share == sorted(share, key=lambda row: -costs[row[0]]) for share in shares)
            assert max(numbers) - min(numbers) <= 1
            assert max(sums) - min(sums) <= max(costs, default=0)


def test_a_row_with_a_picture_costs_more_than_as_many_tokens_of_text():
    samples = SimpleNamespace(input_tokens=[100, 100, 30], media_tokens=[0, 64, 0], store=None)
    assert [Samples.cost(samples, row) for row in ((0,), (1,), (0, 2))] == [100, 132, 130]
    samples.store = "kept features"
    assert Samples.cost(samples, (1,)) == 100


def test_an_epoch_trains_every_supervised_token_once(make):
    run = make(num_epochs=2)
    run("05_train")
    supervised = sum(load_from_disk(run.path / "02_data/train")["supervised_tokens"])
    assert sum(line["supervised_tokens"] for line in run.metrics() if "loss" in line) == 2 * supervised


def test_workers_bring_the_same_batches(make):
    alone, helped = make(val_set_size=0), make(val_set_size=0, dataloader_num_workers=1)
    alone("05_train"), helped("05_train")
    assert alone.metrics() == helped.metrics()


def test_workers_run_ahead_by_fewer_batches_where_these_are_large(make, monkeypatch):
    data = make(val_set_size=0).path / "02_data"
    samples = Samples(load_from_disk(data / "train"), Encoder.load(data / "processor"))
    assert sampler.batches_ahead(samples, 2, 100) == 4
    monkeypatch.setattr(sampler, "AHEAD_BYTES", 2**20)
    found = [sampler.batches_ahead(samples, 2, tokens) for tokens in (1, 1000, 2000, 10**6)]
    assert found == sorted(found, reverse=True) and found[0] == 4 and found[-1] == 1 and len({*found}) > 2


def test_bf16_trains_fp32_masters_which_move_where_bf16_would_not(make):
    run = make(adapter=None, bf16=True, learning_rate=1e-6, max_steps=2)
    run("05_train")
    masters = load_file(run.path / "05_train/checkpoints/step-2/weights.safetensors")
    base = dict(model.load(run.json("03_load_model/model.json"), CPU).named_parameters())
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert all(bool((masters[name] != base[name].float()).any()) for name in masters)
    assert {tensor.dtype for tensor in trained(run).values()} == {torch.bfloat16}


# ---- gradients ----

def test_a_vision_adapter_on_rows_without_pictures_stops_at_the_second_step_by_name(make):
    run = make(rows=text_rows(), lora_target_roles=["language", "vision"])
    with pytest.raises(StageError) as caught:
        run("05_train")
    assert caught.value.what.startswith("12 of 40 trained tensors got no gradient in two steps, such as "
                                        "base_model.model.model.vision_tower.")
    assert caught.value.fix.startswith("the data lack what vision learns from: ")
    assert lines(run.path / "05_train.partial/metrics.jsonl")[-1]["step"] == 1


def test_pictures_that_come_late_are_waited_for(make):
    rows = [*text_rows(8), *colour_rows(1)]
    run = make(rows=rows, lora_target_roles=["language", "vision"], val_set_size=0, micro_batch_size=1,
               gradient_accumulation_steps=1, num_epochs=2)
    with_picture = [bool(tokens) for tokens in load_from_disk(run.path / "02_data/train")["media_tokens"]]
    order = Order([9] * 9, 1, seed=42)
    assert not any(with_picture[order.of_step(step)[0][0]] for step in (0, 1))
    run("05_train")
    assert len(run.losses()) == 18


class Tensors:
    """Named parameters whose gradients are set by hand."""

    def __init__(self, **roles):
        self.roles, self.watch = roles, None
        self.parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in roles}

    def step(self, watch, with_gradient, kinds=frozenset({"image"})):
        for name, parameter in self.parameters.items():
            parameter.grad = torch.full((2,), float(name in with_gradient))
        watch.look(self.parameters, World(0, 1, CPU), kinds)


def test_a_tensor_has_two_steps_to_get_a_gradient():
    tensors = Tensors(a="language", b="language")
    watch = GradientWatch(tensors.roles, kinds_in_data=set())
    tensors.step(watch, ["b"])
    tensors.step(watch, ["a"])
    tensors.step(watch, [])                                        # later on, it isn't looked at any more
    with pytest.raises(StageError, match="1 of 2 trained tensors got no gradient in two steps, such as a"):
        late = GradientWatch(tensors.roles, kinds_in_data=set())
        tensors.step(late, ["b"]), tensors.step(late, ["b"])


@pytest.mark.parametrize("role", ["experts", "embedding"])         # of an embedding, the rows of new tokens
def test_what_no_token_was_sent_to_is_only_reported(role, capsys):
    tensors = Tensors(a="language", b=role)
    watch = GradientWatch(tensors.roles, kinds_in_data=set())
    tensors.step(watch, ["a"]), tensors.step(watch, ["a"]), tensors.step(watch, ["a"])
    assert capsys.readouterr().out.count(f"1 tensors of {role} have had no gradient") == 1


def test_a_tower_waits_for_its_own_medium_only():
    tensors = Tensors(a="language", b="audio", c="vision")
    watch = GradientWatch(tensors.roles, kinds_in_data={"image", "audio"})
    for _ in range(3):
        tensors.step(watch, ["a", "c"], {"image"})                 # no sound yet: what learns from sounds may wait
    tensors.step(watch, ["a", "c"], {"audio"})
    with pytest.raises(StageError, match="such as b"):
        tensors.step(watch, ["a", "c"], {"audio"})


def test_a_projector_of_another_medium_is_only_reported(capsys):
    tensors = Tensors(a="projector", b="projector")
    watch = GradientWatch(tensors.roles, kinds_in_data={"image"})
    tensors.step(watch, ["a"], {"image"}), tensors.step(watch, ["a"], {"image"})
    assert "1 tensors of projector have had no gradient" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm2", "qwen3_vl_moe"])
def test_every_tensor_of_a_family_gets_a_gradient_in_full_fine_tuning(name, make):
    run = make(name, adapter=None, max_steps=2)
    run("05_train")
    assert len(run.losses()) == 2


MLLAMA = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "val_set_size": 0, "num_epochs": 2}


@pytest.mark.parametrize("knobs", [{}, {"adapter": None, "train_roles": ["language"]}])
def test_layers_that_rows_without_pictures_skip_may_wait_for_a_picture(knobs, make):
    """Mllama's layers with cross-attention: the first two steps are of texts alone."""
    run = make("mllama", rows=[*text_rows(4), *colour_rows(4)], **MLLAMA, **knobs)
    first_texts = importlib.import_module("05_train").Order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_texts, "of_step", lambda self, step: [(2 * step % 8,), (2 * step % 8 + 1,)])
        run("05_train")
    assert len(run.losses()) == 8


def test_cross_attention_without_any_picture_in_the_data_is_reported_and_stays_as_it_is(make, capsys):
    run = make("mllama", rows=text_rows(4), **MLLAMA)
    run("05_train")
    assert "tensors of cross_attention have had no gradient" in " ".join(capsys.readouterr().out.split())
    assert not any(tensor.any() for name, tensor in trained(run).items() if "cross_attn" in name and "lora_B" in name)


def test_a_step_without_pictures_leaves_the_projector_as_it_is(make):
    """As torch does it: a parameter without a gradient isn't moved by momentum or weight decay either."""
    rows = [*colour_rows(2), *text_rows(4)]
    run = make("qwen2_5_vl", rows=rows, lora_target_roles=["language", "projector"], weight_decay=0.1, save_steps=1,
               save_total_limit=9, micro_batch_size=1, gradient_accumulation_steps=1, val_set_size=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("05_train").Order, "of_step", lambda self, step: [(step,)])
        run("05_train")
    weights = [load_file(run.path / f"05_train/checkpoints/step-{step}/weights.safetensors") for step in range(1, 7)]
    moved = [{name for name in before if not torch.equal(before[name], after[name])}
             for before, after in zip(weights, weights[1:])]
    of_projector = {name for name in weights[0] if "merger" in name}
    assert of_projector <= moved[0] and all(names and not of_projector & names for names in moved[1:])


# ---- the optimizer ----

def knobs(**changes):
    given = dict(learning_rate=1.0, warmup_steps=None, warmup_ratio=0.0, lr_scheduler="constant",
                 weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
                 optimizer="adamw_torch", cosine_min_lr_ratio=0.0, loraplus_lr_ratio=1.0,
                 learning_rate_vision=None, learning_rate_audio=None, learning_rate_projector=None,
                 weight_decay_vision=None, weight_decay_audio=None, weight_decay_projector=None)
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]),
    ("cosine", [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])])
def test_a_schedule_is_its_formula(schedule, expected):
    rates = [optim.learning_rate(knobs(lr_scheduler=schedule), step, 4) for step in range(4)]
    assert rates == pytest.approx(expected)


def test_the_warm_up_starts_above_zero_and_the_schedule_below_it():
    rates = [optim.learning_rate(knobs(warmup_steps=3, lr_scheduler="linear"), step, 8) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])
    assert optim.warmup_steps(knobs(warmup_ratio=0.03), 100) == 3
    assert optim.warmup_steps(knobs(warmup_ratio=0.03), 10) == 1


def test_weight_decay_is_on_matrices_alone():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.make_optimizer({"v": vector, "m": matrix}, {"v": "language", "m": "language"}, knobs())
    assert {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]} == {
        matrix: 0.1, vector: 0.0}


def test_roles_learn_and_decay_at_their_own_rates_and_b_matrices_learn_faster():
    roles = {"layers.0.lora_A.default.weight": "language", "layers.0.lora_B.default.weight": "language",
             "tower.0.lora_B.default.weight": "vision", "projector.weight": "projector"}
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in roles}
    given = knobs(learning_rate=1e-3, learning_rate_vision=1e-4, loraplus_lr_ratio=16.0)
    optimizer = optim.make_optimizer(parameters, roles, given)
    shares = {p: group["share"] for group in optimizer.param_groups for p in group["params"]}
    assert [shares[p] for p in parameters.values()] == pytest.approx([1.0, 16.0, 1.6, 1.0])
    given = knobs(weight_decay=0.1, weight_decay_vision=0.0, weight_decay_projector=0.3)
    optimizer = optim.make_optimizer(parameters, roles, given)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in parameters.values()] == [0.1, 0.1, 0.0, 0.3]


def test_cosine_may_end_above_zero():
    rates = [optim.learning_rate(knobs(lr_scheduler="cosine", cosine_min_lr_ratio=0.1), step, 4) for step in (0, 2)]
    assert rates == pytest.approx([1.0, 0.1 + 0.9 / 2])


def test_moments_of_8_bits_survive_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    start, slopes = torch.randn(64, 128), torch.randn(4, 64, 128)

    def begun(at):
        parameters = {"a": torch.nn.Parameter(at.clone())}
        return parameters, optim.make_optimizer(parameters, {"a": "language"}, knobs(optimizer="adamw_bnb_8bit"))

    def step(parameters, optimizer, number):
        parameters["a"].grad = slopes[number]
        optimizer.step()

    whole = begun(start)
    for number in range(3):
        step(*whole, number)
    weights = {name: p.detach().clone() for name, p in whole[0].items()}
    path = checkpoint.write(tmp_path / "checkpoints", 3, weights, checkpoint.moments(*whole), {})
    resumed = begun(torch.zeros_like(start))
    checkpoint.load(path, *resumed)
    step(*whole, 3), step(*resumed, 3)
    assert torch.equal(whole[0]["a"], resumed[0]["a"])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"])
def test_a_step_is_adamws_own(optimizer, make):
    run = make(optimizer=optimizer, max_steps=1, weight_decay=0.1, lr_scheduler="constant", warmup_steps=0)
    run("05_train")
    before = load_file(run.path / "04_lora/adapter/adapter_model.safetensors")
    moved = {name: (after - before[name]).abs() for name, after in trained(run).items() if "lora_B" in name}
    for name, step in moved.items():                               # the first step of Adam moves by the rate
        assert step.median() == pytest.approx(1e-3, rel=1e-2), name


# ---- what is written ----

def test_gradient_norms_are_told_by_role_and_the_whole_is_clipped():
    def parameter(*gradient):
        found = torch.nn.Parameter(torch.zeros(len(gradient)))
        found.grad = torch.tensor(gradient)
        return found
    two = {"a": parameter(3.0, 0.0), "b": parameter(0.0, 4.0), "c": parameter(12.0)}
    roles = {"a": "vision", "b": "vision", "c": "language"}
    norms = optim.clip_gradients(two, roles, max_norm=6.5)
    assert {name: float(norm) for name, norm in norms.items()} == {
        "grad_norm": 13, "grad_norm_vision": 5, "grad_norm_language": 12}
    assert two["c"].grad.item() == pytest.approx(6)
    one = optim.clip_gradients({"a": parameter(3.0, 4.0)}, roles, max_norm=100)
    assert {name: float(norm) for name, norm in one.items()} == {"grad_norm": 5}


def test_metrics_are_exact_and_timings_are_apart(make):
    one, two = make(), make()
    one("05_train"), two("05_train")
    exact = one.path / "05_train/metrics.jsonl"
    assert exact.read_bytes() == (two.path / "05_train/metrics.jsonl").read_bytes()
    evaluations = [line for line in one.metrics() if "eval_loss" in line]
    steps = [line for line in one.metrics() if "loss" in line]
    assert [list(line) for line in evaluations] == 2 * [["step", "eval_loss", "eval_token_accuracy"]]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert list(steps[0]) == ["step", "epoch", "loss", "token_accuracy", "learning_rate", "grad_norm",
                              "supervised_tokens"]
    assert [line["epoch"] for line in steps] == [0.5, 1.0]
    timings = lines(one.path / "05_train/timings.jsonl")
    assert [list(line) for line in timings] == 2 * [
        ["step", "seconds", "tokens_per_second", "supervised_tokens_per_second", "images_per_second", "data_wait",
         "padding", "peak_memory_gib"]]
    assert all(0 <= line["data_wait"] <= 1 and line["tokens_per_second"] > 0 for line in timings)
    wrote = one.json("05_train/stage.json")["wrote"]
    assert {"metrics.jsonl", "golden.safetensors", "loss.svg"} < set(wrote)
    assert not [name for name in wrote if "timings" in name or "checkpoints" in name]


def test_a_steps_sizes_count_all_ranks_and_the_padding_of_each_batch():
    samples = SimpleNamespace(input_tokens=[3, 5, 4], supervised_tokens=[1, 2, 2], positions=None,
                              media=[("image",), (), ("image", "audio", "image")])
    rows, shares = [(0,), (1,), (2,)], [[[(0,), (1,)]], [[(2,)], [(~0,)]]]     # the second rank has a blank
    assert sizes(samples, rows, shares) == {"supervised_tokens": 5, "tokens": 12, "room": 16 + 4 + 3, "images": 3}
    samples.positions = "of packed rows"
    assert sizes(samples, rows, shares)["room"] == 16 + 8 + 8


def test_a_role_with_a_rate_of_its_own_has_its_figure():
    found = optim.rates(knobs(learning_rate=1e-3, learning_rate_vision=1e-4), 5e-4)
    assert found == pytest.approx({"learning_rate": 5e-4, "learning_rate_vision": 5e-5})


def test_the_evaluation_loss_is_the_mean_over_all_held_out_tokens(make):
    run = make(micro_batch_size=1, val_set_size=3)
    run("05_train")
    net = model.load(run.json("03_load_model/model.json"), CPU)
    net = attach(net, run.path / "05_train/adapter", trainable=False).eval()
    encoder = encoder_of(run)
    with torch.no_grad():
        pairs = [sum_of_losses(net, encoder(record)) for record in load_from_disk(run.path / "02_data/eval")]
    expected = sum(loss.item() for loss, _ in pairs) / sum(tokens for _, tokens in pairs)
    assert run.metrics()[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_golden_holds_what_the_saved_weights_answer(make):
    run = make()
    run("05_train")
    path = run.path / "05_train/golden.safetensors"
    golden, header = load_file(path), read_header(path)
    held_out = load_from_disk(run.path / "02_data/eval")
    assert header["sample_ids"] == held_out["sample_id"][:]
    assert header["sha256"] == {name: fingerprint(tensor) for name, tensor in trained(run).items()}
    net = model.load(run.json("03_load_model/model.json"), CPU)
    net = attach(net, run.path / "05_train/adapter", trainable=False).eval()
    for number, record in enumerate(held_out):
        row = encoder_of(run)(record)
        supervised = torch.nonzero(row.pop("labels")[0, 1:] != IGNORE_INDEX).flatten()
        with torch.no_grad():
            logits = net(**row, use_cache=False).logits[0, supervised]
        assert torch.equal(golden[f"{number}.logits"], logits)
        assert all(torch.equal(golden[f"{number}.{name}"], tensor) for name, tensor in row.items())


def test_the_loss_curve_is_a_drawing(make):
    run = make()
    run("05_train")
    assert ElementTree.parse(run.path / "05_train/loss.svg").getroot().tag.endswith("svg")


def test_evaluations_and_checkpoints_come_as_often_as_asked():
    due = importlib.import_module("05_train").due
    assert [step for step in range(1, 11) if due(5, 1, None, step, 10)] == [5, 10]
    assert [step for step in range(1, 11) if due(5, 2, None, step, 10)] == [3, 5, 8, 10]
    assert [step for step in range(1, 8) if due(5, 1, None, step, 7)] == [5, 7]
    assert [step for step in range(1, 8) if due(5, 0, None, step, 7)] == []
    assert [step for step in range(1, 8) if due(5, 1, 3, step, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(5, 0, 3, step, 7)] == [3, 6, 7]


def test_without_held_out_rows_nothing_is_evaluated(make):
    run = make(val_set_size=0)
    run("05_train")
    assert not [line for line in run.metrics() if "eval_loss" in line]
    assert len(read_header(run.path / "05_train/golden.safetensors")["sample_ids"]) == 2


# ---- what doesn't fit ----

def test_a_sample_that_isnt_as_02_measured_it_stops_with_both_numbers(make):
    run = make()
    records = load_from_disk(run.path / "02_data/train")
    longer = records.map(lambda record: {"input_tokens": record["input_tokens"] + 1})
    samples = Samples(longer, encoder_of(run))
    tokens = samples.input_tokens[0]
    with pytest.raises(StageError) as caught:
        samples.encoded(0)
    assert caught.value.what.startswith(f"sample {samples.ids[0]} has {tokens - 1} tokens, ")
    assert f"02 measured {tokens} and" in caught.value.what


def test_pictures_that_are_others_than_02_read_or_gone_are_named_wherever_training_starts(make, tmp_path, monkeypatch):
    run = make()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)                                   # where the samples' relative paths mean others
    with pytest.raises(StageError, match="png: no such file"):
        importlib.import_module("05_train").main([str(run.path)])
    for path in run.folder.glob("*.png"):
        Image.new("RGB", (40, 32), "gray").save(elsewhere / path.name)
    with pytest.raises(StageError, match=r"\w+.png: not the file that 02_data read"):
        importlib.import_module("05_train").main([str(run.path)])


def test_training_other_than_04_planned_names_both_sides(make):
    run = make()
    facts = run.json("04_lora/adapter.json") | {"trained_parameters": {"language": 5}}
    (run.path / "04_lora/adapter.json").write_text(json.dumps(facts), encoding="utf-8")
    stamp = run.path / "04_lora/stage.json"
    content = json.loads(stamp.read_text(encoding="utf-8"))
    del content["wrote"]["adapter.json"]                           # as if the ledger hadn't seen it
    stamp.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StageError, match="would train 8,192 parameters of role language, 04_lora planned 5"):
        run("05_train")


# ---- --check ----

def test_check_learns_one_batch_by_heart_and_writes_nothing(make, capsys):
    run = make(lora_target_roles=["language", "head"], lora_r=8)
    before = harness.contents(run.folder)
    run("05_train", "--check")
    assert harness.contents(run.folder) == before
    said = capsys.readouterr().out
    assert "the longest step: " in said and "labels, gradients and optimizer work together" in said
    same, tokens = map(int, re.search(r"of its own answer, (\d+) of (\d+) tokens are predicted again", said).groups())
    assert 0.9 * tokens <= same <= tokens <= 16 and tokens > 0


def test_check_stops_where_training_reads_the_models_own_answer_otherwise(make, monkeypatch):
    run, own = make(), rehearsal.collate
    monkeypatch.setattr(rehearsal, "collate", lambda *words: {
        key: tensor * 0 if key == "pixel_values" else tensor.flip(1) if key == "input_ids" else tensor
        for key, tensor in own(*words).items()})                   # as a collator that spoils what it batches
    with pytest.raises(StageError, match="training reads it otherwise than inference"):
        run("05_train", "--check")


def test_check_says_that_too_little_trains(make):
    run = make(lora_target_roles=["projector"])
    with pytest.raises(StageError, match="doesn't overfit one batch: it .*, not < 0.1") as caught:
        run("05_train", "--check")
    assert "02_data/preview.html" in caught.value.fix


def test_check_names_samples_that_contradict_each_other(make):
    rows = [row("Which?", "red", "red.png"), row("Which?", "blue", "red.png")]
    run = make(rows=rows, val_set_size=0, lora_target_roles=["language", "head"])
    with pytest.raises(StageError, match="rows-[01] and rows-[01] answer the same question differently"):
        run("05_train", "--check")


def test_check_warns_of_a_rate_at_which_nothing_moves(make, capsys):
    run = make(lora_target_roles=["language", "head"], lora_r=8, learning_rate=1e-9)
    run("05_train", "--check")
    assert "learning_rate 1e-09 is far below that: the run may learn nothing" in capsys.readouterr().out

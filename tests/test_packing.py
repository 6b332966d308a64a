"""Packed rows: what every family computes for a sample stays what it computes for it alone, or packing is refused."""
import importlib
import random

import pytest
import torch
from datasets import load_from_disk

from lib import registry
from lib.batches import packing
from lib.batches.order import Order, epoch
from lib.batches.sampler import Batcher
from lib.collator import IGNORE_INDEX
from lib.run.errors import StageError
from lib.training import loss, rehearsal
from tests import zoo
from tests.runner import Run, colour_rows, text_rows
from tests.test_families import NAMES, find

REFUSED = {"mllama", "qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv", "paligemma"}
TURNS = [(1, "What is it?", "a red fox"), (0, "Say no", "no"), (2, "Two?", "a bird and a fox"), (1, "And this?", "no fox")]
MIXED = [row for pair in zip(colour_rows(), text_rows()) for row in pair]


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def rows_of(subject):
    """Four samples: with a picture, without, with two, with one."""
    return [row for turn in TURNS for row in subject.rows(turn)]


def packed_batch(subject, net, rows):
    """The rows as two packed ones in a batch: three samples and one, so that the second has a padded end."""
    needs = packing.needs(net, subject.family)
    style = subject.encoder.collate
    joined = [packing.join(part, needs["positions"], style) for part in (rows[:3], rows[3:])]
    return Batcher(subject.encoder.pad_id, style, needs["masks"])(joined)


def gradients(net, batches):
    """(sum of losses, {name: gradient}) of these batches."""
    net.zero_grad()
    total = 0.0
    for batch in batches:
        summed, _ = loss.forward_loss(net, batch)
        summed.backward()
        total += float(summed.detach())
    return total, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ every family

def test_a_packed_sample_has_the_loss_and_gradients_that_it_has_alone(subject, tmp_path):
    if subject.name in REFUSED:
        pytest.skip("refused, see below")
    net, _ = subject.adapter(tmp_path)
    net.eval()
    rows = rows_of(subject)
    alone, packed = [subject.batch([row]) for row in rows], packed_batch(subject, net, rows)
    assert rehearsal.leak(net, alone, packed)[0] < 1e-4
    (loss_alone, wanted), (loss_packed, found) = gradients(net, alone), gradients(net, [packed])
    assert loss_packed == pytest.approx(loss_alone, rel=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 0
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_no_sample_predicts_the_first_token_of_the_next():
    rows = [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}] * 2
    joined = packing.join(rows, packing.Positions(None, None), "cat")
    assert joined["labels"].tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX, 6]]


def test_a_family_whose_samples_would_see_one_another_is_refused(subject):
    if subject.name not in REFUSED:
        assert subject.family.packing == ""
        return
    with pytest.raises(StageError, match="can't be packed") as error:
        packing.needs(subject.base, subject.family)
    assert subject.family.packing in str(error.value)


def test_the_refused_families_leak_indeed(tmp_path_factory):
    subject = find("qwen3_5", tmp_path_factory)
    rows = rows_of(subject)
    needs = {"positions": packing.Positions.of(subject.base)}
    joined = packing.join(rows, needs["positions"], subject.encoder.collate)
    packed = Batcher(subject.encoder.pad_id, subject.encoder.collate)([joined])
    change, limit = rehearsal.leak(subject.base, [subject.batch([row]) for row in rows], packed)
    assert change > 10 * limit


# ------------------------------------------------------------------------------------------------ filling rows

def test_no_sample_is_lost_and_no_row_overfull():
    chance = random.Random(0)
    lengths = [chance.randint(1, 300) for _ in range(2000)]
    rows = packing.fill(list(range(2000)), lengths, 300)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 300
    assert sum(lengths) / (300 * len(rows)) > 0.97                     # less than 3 % of the room stays empty


def test_samples_of_one_length_are_dealt_to_all_rows_that_have_room_for_them():
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [62 + n % 2 for n in range(800)]
    rows = packing.fill(list(range(800)), lengths, 8 * 63)
    assert sum(len({lengths[i] for i in row}) == 1 for row in rows) > 90             # all but a few are alike
    dealt = packing.mixed(rows, lengths, 8 * 63, generator)
    assert sum(len({lengths[i] for i in row}) == 1 for row in dealt) < 10
    lengths = [chance.randint(1, 330) for _ in range(2000)]                          # some longer than a row
    rows = packing.fill(list(range(2000)), lengths, 300)
    dealt = packing.mixed(rows, lengths, 300, generator)
    assert len(dealt) == len(rows) and dealt != rows
    assert sorted(index for row in dealt for index in row) == list(range(2000))
    assert all(sum(lengths[i] for i in row) <= 300 or len(row) == 1 for row in dealt)


def test_a_sample_longer_than_a_row_is_alone():
    assert sorted(packing.fill([0, 1, 2], [9, 4, 4], 8)) == [(0,), (1, 2)]


def test_samples_of_one_length_are_trained_in_the_order_in_which_they_are_without_packing():
    in_rows, alone = Order([63] * 100, 1, seed=5, room=8 * 63), Order([63] * 100, 8, seed=5)
    for step in range(26):                                                           # two epochs of 13
        assert [index for row in in_rows.of_step(step) for index in row] == [index for index, in alone.of_step(step)]


def test_every_epoch_has_other_rows_but_as_many():
    chance = random.Random(1)
    order = Order([chance.randint(5, 60) for _ in range(300)], 4, seed=7, room=64)
    first, second = epoch(order, 0), epoch(order, 1)
    assert len(first) == len(second) and set(first) != set(second)
    seen = [index for step in range(order.steps_per_epoch) for row in order.of_step(step) for index in row]
    assert sorted(seen) == list(range(300))


def test_steps_of_similar_length_still_see_every_sample_once():
    chance = random.Random(2)
    lengths = [chance.randint(5, 500) for _ in range(1001)]
    order, plain = (Order(lengths, 8, seed=3, by_length=grouped) for grouped in (True, False))
    seen = [row[0] for step in range(order.steps_per_epoch) for row in order.of_step(step)]
    assert sorted(seen) == list(range(1001)) and len(order.of_step(order.steps_per_epoch - 1)) == 1
    assert padding(order) < padding(plain) / 4


def padding(order):
    """The share of padding in an epoch's steps, each padded to its longest sample."""
    steps = [[order.lengths[row[0]] for row in order.of_step(step)] for step in range(order.steps_per_epoch)]
    return 1 - sum(map(sum, steps)) / sum(max(step) * len(step) for step in steps)


# ------------------------------------------------------------------------------------------------ in the loop

def test_packed_training_takes_fewer_steps_of_the_same_samples(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, zoo.build("qwen2_5_vl", tmp_path / "base"), MIXED,
              sample_packing=True, sequence_len=160, micro_batch_size=1, gradient_accumulation_steps=1)
    run.upto("05_train")
    counts = [line["supervised_tokens"] for line in run.metrics() if "loss" in line]
    samples = load_from_disk(run.path / "02_data/train")
    assert len(counts) < len(samples) and sum(counts) == sum(samples["supervised_tokens"])


def test_packing_that_leaks_stops_before_the_first_step(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, zoo.build("qwen3_5", tmp_path / "base"), MIXED,
              sample_packing=True)
    run.upto("04_lora")
    with pytest.raises(StageError, match="can't be packed"):
        run("05_train")
    monkeypatch.setattr(registry, "FAMILIES", ())                      # no record: the model itself shows it
    with pytest.raises(StageError, match="see one another"):
        importlib.import_module("05_train").main(["run"])


def test_only_samples_of_one_kind_share_a_row():
    order = Order([5] * 40, 4, seed=1, room=20, kinds=[index % 2 for index in range(40)])
    rows = epoch(order, 0)
    assert sorted(index for row in rows for index in row) == list(range(40))
    assert all(len({index % 2 for index in row}) == 1 for row in rows) and len(rows) == 10

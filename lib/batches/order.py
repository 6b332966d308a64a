"""order: which samples each optimizer step trains, and which of them each rank has in which micro-batch.

A row is a tuple of samples: a single one, or those that are packed together. The order depends on (seed,
epoch) only, and a step's rows are fixed before they are dealt to ranks and micro-batches: so 4x1, 2x2 and 1x4
train the same, on one rank or several, and resuming at step N needs no more than N.
"""
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch

from lib.batches import packing

Row = tuple[int, ...]                     # indices of samples; ~index: sample `index`, with no trained token
WINDOW = 64                               # steps within which group_by_length sorts


def sample_of(index: int) -> int:
    """The index of the sample that an entry of a row means: ~index, which doesn't train, is `index`."""
    return max(index, ~index)


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every optimizer step; an epoch's last step may be smaller, no sample is dropped.

    lengths: tokens of each sample. global_batch_size: rows of a step, over all ranks and micro-batches.
    room: tokens that a packed row may hold; None: each sample is a row. by_length: samples of a step are of
    similar length. kinds: a number for each sample, where only samples with the same one may share a row.
    """
    lengths: list[int]
    global_batch_size: int
    seed: int
    room: int | None = None
    by_length: bool = False
    kinds: list[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of an epoch, which see every sample once; each epoch has as many."""
        return math.ceil(len(epoch(self, 0)) / self.global_batch_size)

    def total_steps(self, num_epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run; max_steps wins over num_epochs."""
        return max_steps if max_steps is not None else max(1, math.ceil(num_epochs * self.steps_per_epoch))

    def of_step(self, step: int) -> list[Row]:
        """The rows of optimizer step `step` (from 0), over all ranks."""
        number, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return epoch(self, number)[start:start + self.global_batch_size]


@functools.lru_cache(maxsize=4)           # workers run ahead into the next epoch
def epoch(order: Order, number: int) -> list[Row]:
    """The rows of an epoch in their order."""
    generator = torch.Generator().manual_seed(order.seed * 1_000_003 + number)
    samples = torch.randperm(len(order.lengths), generator=generator).tolist()
    if order.room is not None:
        rows = packed(samples, order.lengths, order.room, order.kinds, generator)
        place = dict(zip(samples, range(len(samples))))         # samples of one length keep their order so
        return sorted(rows, key=lambda row: place[row[0]])
    if order.by_length:
        samples = grouped(samples, order, generator)
    return [(index,) for index in samples]


def in_turn(samples, room: int | None, chosen: Iterable[int] | None = None) -> list[Row]:
    """Rows of all samples, or of the chosen ones, in their order; packed, if room is given."""
    chosen = range(len(samples)) if chosen is None else chosen
    if room is None:
        return [(index,) for index in chosen]
    return packed(chosen, samples.input_tokens, room, samples.kinds)


def packed(samples: Iterable[int], lengths: list[int], room: int, kinds: list[int] | None,
           generator: torch.Generator | None = None) -> list[Row]:
    """The samples packed in rows of at most `room` tokens, each of one kind; a generator mixes them."""
    groups: dict[int, list[int]] = {}
    for index in samples:
        groups.setdefault(kinds[index] if kinds else 0, []).append(index)
    rows = [packing.fill(group, lengths, room) for group in groups.values()]
    if generator is not None:
        rows = [packing.mixed(group, lengths, room, generator) for group in rows]
    return list(chain.from_iterable(rows))


def grouped(samples: list[int], order: Order, generator: torch.Generator) -> list[int]:
    """The samples, sorted by length within every WINDOW steps; the order of these steps is random again."""
    size, found = order.global_batch_size, []
    for start in range(0, len(samples), WINDOW * size):
        window = sorted(samples[start:start + WINDOW * size], key=lambda i: -order.lengths[i])
        steps = [window[i:i + size] for i in range(0, len(window), size)]
        whole = torch.randperm(len(window) // size, generator=generator).tolist()  # a smaller one stays last
        found += [index for i in [*whole, *range(len(whole), len(steps))] for index in steps[i]]
    return found


def dealt(rows: list[Row], micro_batch_size: int, world_size: int, kinds: list[int] | None = None,
          cost: Callable[[Row], float] = lambda row: 0) -> list[list[list[Row]]]:
    """Each rank's share of a step, cut into micro-batches; empty for some ranks if a last step has few rows.

    The costliest rows come first, so that a micro-batch has rows of similar length. Where samples have kinds,
    only rows of one kind share a micro-batch.
    """
    def cut(share: list[Row]) -> list[list[Row]]:
        groups: dict[int, list[Row]] = {}
        for row in share:
            groups.setdefault(kinds[row[0]] if kinds else 0, []).append(row)
        size = micro_batch_size
        return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
    return [*map(cut, balanced(rows, world_size, cost))]


def balanced(rows: list[Row], world_size: int, cost: Callable[[Row], float]) -> list[list[Row]]:
    """The rows of each rank, costliest first: equally many (or one fewer), of about the same total cost.

    Ranks wait for the slowest. Each gets one of the `world_size` costliest rows, then one of the next, and so
    on; the costlier row goes to the rank with the lower cost so far.
    """
    shares, sums = [[] for _ in range(world_size)], [0.0] * world_size
    ranked = sorted(rows, key=cost, reverse=True)                  # of equal cost: in their order
    for start in range(0, len(rows), world_size):
        poorest = sorted(range(world_size), key=sums.__getitem__)
        for row, rank in zip(ranked[start:start + world_size], poorest):
            shares[rank].append(row)
            sums[rank] += cost(row)
    return shares

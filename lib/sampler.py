"""sampler: which samples each optimizer step trains, and the loader that brings them as batches.

A row is a tuple of samples: of one, or of those that are packed together. The order depends on (seed, epoch)
only, and a step's rows are fixed before they are dealt out to ranks and micro-batches: 4x1, 2x2 and 1x4 train
the same, on one rank or several, and resuming at step N needs N alone.
"""
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow.compute
import torch
from torch.utils.data import DataLoader, Dataset

from lib import features, packing
from lib.chat import IGNORE_INDEX, Encoder
from lib.collator import collate
from lib.loss import supervised_positions
from lib.stage import StageError
from lib.store import Store

Row = tuple[int, ...]
AHEAD_BYTES = 2**31                       # of batches that wait for the model, over all workers
WINDOW = 64                               # steps among which group_by_length sorts


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every optimizer step; an epoch's last step may be smaller, nothing is dropped.

    lengths: tokens of each sample. global_batch_size: rows of a step, over all ranks and micro-batches.
    room: tokens that a row of packed samples may hold; None is a sample a row. by_length: neighbours in a
    step are of similar length. kinds: of each sample, where only those of one kind may share a row.
    """
    lengths: list[int]
    global_batch_size: int
    seed: int
    room: int | None = None
    by_length: bool = False
    kinds: list[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every sample once; as many in each epoch."""
        return math.ceil(len(epoch(self, 0)) / self.global_batch_size)

    def total_steps(self, num_epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run; max_steps wins over num_epochs."""
        return max_steps if max_steps is not None else max(1, math.ceil(num_epochs * self.steps_per_epoch))

    def of_step(self, step: int) -> list[Row]:
        """The rows of optimizer step `step` (from 0), over all ranks."""
        number, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return epoch(self, number)[start:start + self.global_batch_size]

    def full(self) -> float:
        """The share of the rows' room that samples fill."""
        return sum(self.lengths) / (len(epoch(self, 0)) * self.room)


@functools.lru_cache(maxsize=4)           # workers run ahead into the next epoch
def epoch(order: Order, number: int) -> list[Row]:
    """The rows of an epoch in their order."""
    generator = torch.Generator().manual_seed(order.seed * 1_000_003 + number)
    samples = torch.randperm(len(order.lengths), generator=generator).tolist()
    if order.room is not None:
        rows = packed(samples, order.lengths, order.room, order.kinds)
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    if order.by_length:
        samples = grouped(samples, order, generator)
    return [(index,) for index in samples]


def in_turn(samples: "Samples", room: int | None, chosen: Iterable[int] | None = None) -> list[Row]:
    """Rows of all samples, or the chosen ones, in their own order, packed where rows have room."""
    chosen = range(len(samples)) if chosen is None else chosen
    if room is None:
        return [(index,) for index in chosen]
    return packed(chosen, samples.input_tokens, room, samples.kinds)


def packed(samples: Iterable[int], lengths: list[int], room: int, kinds: list[int] | None) -> list[Row]:
    """The samples in rows of at most `room` tokens, each row of one kind."""
    groups: dict[int, list[int]] = {}
    for index in samples:
        groups.setdefault(kinds[index] if kinds else 0, []).append(index)
    return [row for group in groups.values() for row in packing.fill(group, lengths, room)]


def grouped(samples: list[int], order: Order, generator: torch.Generator) -> list[int]:
    """The samples, sorted by length within WINDOW steps, whose own order is a random one again."""
    size, found = order.global_batch_size, []
    for start in range(0, len(samples), WINDOW * size):
        window = sorted(samples[start:start + WINDOW * size], key=lambda i: -order.lengths[i])
        steps = [window[i:i + size] for i in range(0, len(window), size)]
        whole = torch.randperm(len(window) // size, generator=generator).tolist()  # a smaller one stays last
        found += [index for i in [*whole, *range(len(whole), len(steps))] for index in steps[i]]
    return found


def dealt(rows: list[Row], micro_batch_size: int, rank: int, world_size: int,
          kinds: list[int] | None = None) -> list[list[Row]]:
    """One rank's share of a step, cut into micro-batches: none at all where a last step has few rows.

    Where samples have kinds, only those of one kind share a micro-batch.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows[rank::world_size]:
        groups.setdefault(kinds[row[0]] if kinds else 0, []).append(row)
    size = micro_batch_size
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def media_kinds(column) -> list[tuple[str, ...]]:
    """The kinds of each sample's media ("image", "audio", "video"), of the Arrow column that holds them."""
    kinds = iter(pyarrow.compute.struct_field(pyarrow.compute.list_flatten(column), "kind").to_pylist())
    counts = pyarrow.compute.list_value_length(column).to_pylist()
    return [tuple(itertools.islice(kinds, count)) for count in counts]


SHARING = {  # a family's rule: a number for each sample, of which equal ones may share a batch
    "any": lambda media: None,
    "alike": lambda media: [len(kinds) for kinds in media],
    "clips_apart": lambda media: [int("video" in kinds) for kinds in media],
}


@dataclass
class Samples(Dataset):
    """02's samples, encoded one by one in the DataLoader's workers and compared with what 02 measured.

    `samples[row]` is one encoded row. positions, masks: what packed rows also need; None without packing.
    store: where vision features are kept, once they are. even: whether all ranks get as many micro-batches,
    blank ones if need be, as a sharded model wants it.
    """
    records: object
    encoder: Encoder
    positions: packing.Positions | None = None
    masks: packing.BlockMasks | None = None
    store: Store | None = None
    even: bool = False
    ids: list[str] = field(init=False)
    input_tokens: list[int] = field(init=False)
    media_tokens: list[int] = field(init=False)
    media: list[tuple[str, ...]] = field(init=False)
    supervised_tokens: list[int] = field(init=False)
    kinds: list[int] | None = field(init=False)

    def __post_init__(self):
        columns = self.records.with_format("arrow")  # as whole columns, since a row would bring its pictures
        self.ids = columns["sample_id"].to_pylist()
        self.input_tokens, self.media_tokens, self.supervised_tokens = (
            columns[f"{kind}_tokens"].to_pylist() for kind in ("input", "media", "supervised"))
        self.media = media_kinds(columns["media"])
        self.kinds = SHARING[self.encoder.batch](self.media)

    def dealt(self, rows: list[Row], micro_batch_size: int, rank: int, world_size: int) -> list[list[Row]]:
        """`dealt`, by what the family lets share a batch."""
        if not self.even:
            return dealt(rows, micro_batch_size, rank, world_size, self.kinds)
        shares = [dealt(rows, micro_batch_size, each, world_size, self.kinds) for each in range(world_size)]
        blank = [(~rows[0][0],)]
        return shares[rank] + [blank] * (max(map(len, shares)) - len(shares[rank]))

    def by_dataset(self) -> dict[str, list[int]]:
        """{data set's name: its samples}; a sample is called by it and its row."""
        found: dict[str, list[int]] = {}
        for index, sample_id in enumerate(self.ids):
            found.setdefault(sample_id.rpartition("-")[0], []).append(index)
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Row) -> dict[str, torch.Tensor]:
        encoded = [self.encoded(index) if self.store is None else self.store.read(self.records[index])
                   for index in row]
        if self.positions is None:
            return encoded[0]
        return packing.join(encoded, self.positions, self.encoder.collate)

    def encoded(self, index: int) -> dict[str, torch.Tensor]:
        """A sample's tensors; a StageError where they are not what 02 measured. ~index: none is trained."""
        if index < 0:
            row = self.encoded(~index)
            return row | {"labels": torch.full_like(row["labels"], IGNORE_INDEX)}
        row = self.encoder(self.records[index])
        found = row["input_ids"].shape[1], int((row["labels"][:, 1:] != IGNORE_INDEX).sum())
        measured = self.input_tokens[index], self.supervised_tokens[index]
        if found != measured:
            raise StageError(f"sample {self.ids[index]} has {found[0]} tokens, {found[1]} of them trained; "
                             f"02 measured {measured[0]} and {measured[1]}",
                             "run 02_data.py again with --force: its libraries or files were others")
        return row


@dataclass
class Batcher:
    """Encoded rows to one batch, with the supervised positions found here, on the CPU.

    masks: makes the attention masks of packed rows; None where position ids do.
    """
    pad_id: int
    style: str
    masks: packing.BlockMasks | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        packed, kept = ([row.pop(key) for row in rows if key in row] for key in ("packed", "features"))
        batch = collate(rows, self.pad_id, self.style)
        batch["positions"], batch["targets"] = supervised_positions(batch["labels"])
        if packed:
            batch["packed_rows"] = packed
        if kept:
            batch["features"] = features.together(kept)
        if self.masks is not None:
            batch["attention_mask"] = self.masks(batch)
        return batch


def loader(samples: Samples, batches: Iterable[list[Row]], workers: int, device: torch.device,
           tokens: int = 1) -> DataLoader:
    """A batch for each list of rows, in that order, decoded and encoded in `workers` processes.

    tokens: in the longest batch; workers run ahead by a few batches, and by fewer where these are large.
    """
    encoder, processes = samples.encoder, {}
    if workers and len(samples):
        processes = {"multiprocessing_context": "spawn", "persistent_workers": True,
                     "prefetch_factor": batches_ahead(samples, workers, tokens)}
    batcher = Batcher(encoder.pad_id, encoder.collate, samples.masks)
    return DataLoader(samples, batch_sampler=batches, collate_fn=batcher, num_workers=workers,
                      pin_memory=device.type == "cuda", **processes)


def batches_ahead(samples: Samples, workers: int, tokens: int) -> int:
    """How many batches of so many tokens each worker may have ready: 4, or what AHEAD_BYTES hold, at least 1.

    Their bytes are those of the sample with most media, for each of its tokens.
    """
    heaviest = max(range(len(samples)), key=samples.media_tokens.__getitem__)
    tensors = [value for value in samples[(heaviest,)].values() if isinstance(value, torch.Tensor)]
    size = sum(tensor.nbytes for tensor in tensors) * tokens / samples.input_tokens[heaviest]
    return max(1, min(4, int(AHEAD_BYTES / size / workers)))


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device; pinned memory makes the copy overlap with computing."""
    def moved(value):
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner) for inner in value]
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
    return moved(batch)

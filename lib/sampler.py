"""sampler: which samples each optimizer step trains, and the loader that brings them as batches.

The order depends on (seed, epoch) only. A step's samples are fixed before they are dealt out to ranks and
micro-batches: 4x1, 2x2 and 1x4 train the same, on one rank or several, and resuming at step N needs N alone.
"""
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow.compute
import torch
from torch.utils.data import DataLoader, Dataset

from lib.chat import IGNORE_INDEX, Encoder
from lib.collator import collate
from lib.loss import supervised_positions
from lib.stage import StageError


@dataclass(frozen=True)
class Order:
    """The sample indices of every optimizer step; an epoch's last step may be smaller, nothing is dropped."""
    samples: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every sample once."""
        return math.ceil(self.samples / self.global_batch_size)

    def total_steps(self, num_epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run; max_steps wins over num_epochs."""
        return max_steps if max_steps is not None else max(1, math.ceil(num_epochs * self.steps_per_epoch))

    def of_step(self, step: int) -> list[int]:
        """The samples of optimizer step `step` (from 0), over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return permutation(self.samples, self.seed, epoch)[start:start + self.global_batch_size]


@functools.lru_cache(maxsize=4)
def permutation(samples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator).tolist()


def dealt(indices: list[int], micro_batch_size: int, rank: int, world_size: int,
          kinds: list[int] | None = None) -> list[list[int]]:
    """One rank's share of a step, cut into micro-batches: none at all where a last step has few samples.

    Where samples have kinds, only those of one kind share a micro-batch.
    """
    groups: dict[int, list[int]] = {}
    for index in indices[rank::world_size]:
        groups.setdefault(kinds[index] if kinds else 0, []).append(index)
    size = micro_batch_size
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


@dataclass
class Samples(Dataset):
    """02's samples, encoded one by one in the DataLoader's workers and compared with what 02 measured."""
    records: object
    encoder: Encoder
    ids: list[str] = field(init=False)
    input_tokens: list[int] = field(init=False)
    media_tokens: list[int] = field(init=False)
    supervised_tokens: list[int] = field(init=False)
    kinds: list[int] | None = field(init=False)

    def __post_init__(self):
        columns = self.records.with_format("arrow")  # as whole columns, since a row would bring its pictures
        self.ids = columns["sample_id"].to_pylist()
        self.input_tokens, self.media_tokens, self.supervised_tokens = (
            columns[f"{kind}_tokens"].to_pylist() for kind in ("input", "media", "supervised"))
        pictures = pyarrow.compute.list_value_length(columns["media"]).to_pylist()
        self.kinds = pictures if self.encoder.batch == "alike" else None

    def dealt(self, indices: list[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        """`dealt`, by what the family lets share a batch."""
        return dealt(indices, micro_batch_size, rank, world_size, self.kinds)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
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
    """Encoded rows to one batch, with the supervised positions found here, on the CPU."""
    pad_id: int
    style: str

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(rows, self.pad_id, self.style)
        batch["positions"], batch["targets"] = supervised_positions(batch["labels"])
        return batch


def loader(samples: Samples, batches: Iterable[list[int]], workers: int, device: torch.device) -> DataLoader:
    """A batch for each list of indices, in that order, decoded and encoded in `workers` processes."""
    encoder, processes = samples.encoder, {}
    if workers:
        processes = {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": 4}
    return DataLoader(samples, batch_sampler=batches, collate_fn=Batcher(encoder.pad_id, encoder.collate),
                      num_workers=workers, pin_memory=device.type == "cuda", **processes)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device; pinned memory makes the copy overlap with computing."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

"""sampler: 02's samples as the batches that the loop gets, decoded and encoded in workers.

lib/batches/order.py says which samples, and in which order.
"""
import itertools
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow.compute
import torch
from torch.utils.data import DataLoader, Dataset

from lib.batches import packing
from lib.batches.order import Row, dealt, sample_of
from lib.collator import IGNORE_INDEX, collate, supervised_positions
from lib.fast import features
from lib.fast.store import Store
from lib.run.errors import StageError
from lib.text.chat import Encoder

TOWER = 0.5                               # a frozen tower's FLOPs per media token, over a token's: 0.2 to 0.8
AHEAD_BYTES = 2**31                       # of the batches that wait for the model at most, over all workers


def media_kinds(column) -> list[tuple[str, ...]]:
    """The kinds of each sample's media ("image", "audio", "video"), from the Arrow column of records."""
    kinds = iter(pyarrow.compute.struct_field(pyarrow.compute.list_flatten(column), "kind").to_pylist())
    counts = pyarrow.compute.list_value_length(column).to_pylist()
    return [tuple(itertools.islice(kinds, count)) for count in counts]


SHARING = {  # {a family's rule: a number for each sample; samples with equal ones may share a batch}
    "any": lambda media: None,
    "alike": lambda media: [len(kinds) for kinds in media],
    "clips_apart": lambda media: [int("video" in kinds) for kinds in media],
}


@dataclass
class Samples(Dataset):
    """02's samples, encoded one by one in the DataLoader's workers and compared with what 02 measured.

    `samples[row]` is one encoded row. positions, masks: what packed rows need besides; None without packing.
    store: holds vision features, once they are kept. even: give every rank as many micro-batches, blank ones
    if need be, as a sharded model needs it.
    """
    records: object
    encoder: Encoder
    positions: packing.Positions | None = None
    masks: packing.BlockMasks | None = None
    store: Store | None = None
    even: bool = False

    def __post_init__(self):
        columns = self.records.with_format("arrow")  # as whole columns, since a row would bring its pictures
        self.ids = columns["sample_id"].to_pylist()
        self.input_tokens, self.media_tokens, self.supervised_tokens = (
            columns[f"{kind}_tokens"].to_pylist() for kind in ("input", "media", "supervised"))
        self.media = media_kinds(columns["media"])
        self.kinds = SHARING[self.encoder.batch](self.media)

    def dealt(self, rows: list[Row], micro_batch_size: int, world_size: int) -> list[list[list[Row]]]:
        """Each rank's micro-batches of a step's rows, by `order.dealt` and the rows' costs."""
        shares = dealt(rows, micro_batch_size, world_size, self.kinds, self.cost)
        most, blank = max(map(len, shares)), [(~rows[0][0],)]
        return [share + [blank] * (most - len(share)) for share in shares] if self.even else shares

    def cost(self, row: Row) -> float:
        """About how much a row costs to compute, in tokens of the language model, a tower's part included."""
        tower = TOWER if self.store is None else 0
        return sum(self.input_tokens[index] + tower * self.media_tokens[index] for index in row)

    def by_dataset(self) -> dict[str, list[int]]:
        """{data set's name: indices of its samples}, by the samples' ids, which begin with the name."""
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
        """A sample's tensors; StageError where they are not what 02 measured. ~index: no token is trained."""
        if index < 0:
            row = self.encoded(sample_of(index))
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
    """Makes one batch of encoded rows, and finds the supervised positions here, on the CPU.

    masks: makes the attention masks of packed rows; None where position ids suffice.
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


class Loader(DataLoader):
    """A DataLoader that raises for a dead worker where a batch is waited for, and nowhere else.

    torch's handler of SIGCHLD would raise wherever the process is: within a step, a checkpoint or a message.
    """

    def __iter__(self) -> Iterator:
        """An iterator over batches, its workers started; the signal's handler is as before."""
        if not self.num_workers:
            return super().__iter__()
        number = getattr(signal, "SIGCHLD", None)                  # not on Windows
        before = number and signal.getsignal(number)
        try:
            return self._received(super().__iter__())
        finally:
            if number:
                signal.signal(number, before)

    @staticmethod
    def _received(batches: Iterator) -> Iterator:
        """The batches; RuntimeError where one's tensors have gone with the worker that made it."""
        try:
            yield from batches
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if str(error).startswith("Caught "):  # a row's own error, from a worker that lives
                raise
            raise RuntimeError(f"DataLoader worker gone, and a batch with it ({error})") from error


def loader(samples: Samples, batches: Iterable[list[Row]], workers: int, device: torch.device,
           tokens: int = 1) -> DataLoader:
    """A loader of one batch for each list of rows, in that order, made in `workers` processes.

    tokens: of the longest batch; workers prepare a few batches ahead, and fewer where these are large.
    """
    encoder, processes = samples.encoder, {}
    if workers and len(samples):
        processes = {"multiprocessing_context": "spawn", "persistent_workers": True,
                     "prefetch_factor": batches_ahead(samples, workers, tokens)}
    batcher = Batcher(encoder.pad_id, encoder.collate, samples.masks)
    return Loader(samples, batch_sampler=batches, collate_fn=batcher, num_workers=workers,
                  pin_memory=device.type == "cuda", **processes)


def batches_ahead(samples: Samples, workers: int, tokens: int) -> int:
    """How many batches of so many tokens each worker may have ready: 1 to 4, by what AHEAD_BYTES hold.

    A token's bytes are taken from the sample with the most media.
    """
    heaviest = max(range(len(samples)), key=samples.media_tokens.__getitem__)
    tensors = [value for value in samples[(heaviest,)].values() if isinstance(value, torch.Tensor)]
    size = sum(tensor.nbytes for tensor in tensors) * tokens / samples.input_tokens[heaviest]
    return max(1, min(4, int(AHEAD_BYTES / size / workers)))


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the device; from pinned memory, the copy overlaps with computing."""
    from accelerate.utils import send_to_device
    return send_to_device(batch, device, non_blocking=True)

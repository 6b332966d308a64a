"""measuring: the rows of a data set, measured by several processes and handed on in their order.

A worker gets rows and returns plain data, so the result doesn't depend on the number of workers.
"""
import gc
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import pyarrow
import torch

from lib.data import samples
from lib.data.files import Row, Source
from lib.data.rows import Rows
from lib.run.errors import StageError

FEW, MANY = 64, 256                       # rows that a process measures at a time, at least and at most
PARTS = 64                                # a data set that has more parts of FEW rows gets larger ones
PART_BYTES = 2**22                        # a part whose rows hold as many bytes gets no other row
AHEAD = 4                                 # parts that wait for each process

reader: Rows | None = None                # the data set that this process measures


@dataclass
class Part:
    """What became of some rows: samples, rejects, and the files that were read, with their hashes."""
    rows: int
    samples: pyarrow.RecordBatch | None = None
    rejects: list[dict] = field(default_factory=list)
    files: list[tuple[Path, str | None]] = field(default_factory=list)


def measured(rows: Rows, given: Source, processes: int | None) -> Iterator[Part]:
    """The Parts of all rows, in their order. processes: None means one for each core."""
    parts = cut(given)
    first = list(islice(parts, 2))
    if len(first) < 2 or processes == 1:
        start(rows)
        yield from map(part, chain(first, parts))
        return
    number = processes or cores()
    waiting = deque()
    gc.freeze()                           # the collector would write into, and so copy, shared memory
    with ProcessPoolExecutor(number, initializer=start_worker, initargs=(replace(rows, uses=None),)) as pool:
        try:
            for each in chain(first, parts):
                waiting.append(pool.submit(part, each))
                if len(waiting) > AHEAD * number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise StageError("a process that measured rows has died, most often for want of memory",
                             "dataset_processes: 1, or fewer than now") from None
        finally:
            gc.unfreeze()


def cut(given: Source) -> Iterator[list[Row]]:
    """The rows in parts. Their borders depend on the rows alone, and so the tables made of them do."""
    rows, size, most = [], 0, min(MANY, max(FEW, len(given) // PARTS))
    for each in given:
        rows.append(each)
        size += bytes_in(each[2])
        if len(rows) == most or size >= PART_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def bytes_in(row) -> int:
    """About how many bytes a row holds, texts and media; of an unparsed line, its length."""
    if isinstance(row, bytes | str):
        return len(row)
    if isinstance(row, dict):
        return sum(map(bytes_in, row.values()))
    return sum(map(bytes_in, row)) if isinstance(row, list) else 0


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker(rows: Rows) -> None:
    """Prepare a worker process: one thread, the rows' data set, and Ctrl-C left to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    start(rows)


def start(rows: Rows) -> None:
    """Make this process ready to measure rows of a data set."""
    global reader
    reader = rows


def part(given: list[Row]) -> Part:
    """The Part that these rows become, by this process's data set."""
    found = Part(len(given))
    noting = replace(reader, uses=lambda path, sha256=None: found.files.append((path, sha256)))
    measured_samples, found.rejects = noting.measured(given)
    found.samples = samples.batch_of(measured_samples)
    return found

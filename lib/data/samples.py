"""samples: the records that 02 hands on, the choice of those held out, and their files.

A sample holds no pixels and no token ids: it has its text, which characters are trained, where its media are,
and its lengths. However many there are, they stay in files: what is counted or chosen here are columns of
numbers, and a choice is an array of places in the table, ascending, one several times where a weight says so.
"""
import random
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.run import terminal
from lib.run.errors import StageError

SPAN = pa.struct({"start": pa.int32(), "end": pa.int32()})
MEDIUM = pa.struct({"kind": pa.string(), "path": pa.string(), "sha256": pa.string(), "width": pa.int32(),
                    "height": pa.int32(), "seconds": pa.float32(),
                    "bytes": pa.large_binary()})                 # a batch may have more than 2 GiB of them
SAMPLE = {"sample_id": pa.string(), "row": pa.int64(), "dataset": pa.string(), "messages": pa.string(),
          "text": pa.string(), "spans": pa.list_(SPAN), "reply": SPAN, "media": pa.list_(MEDIUM),
          "image_bounds": pa.string(), "input_tokens": pa.int32(), "media_tokens": pa.int32(),
          "supervised_tokens": pa.int32()}
NOTES = {"pictures": pa.int32(), "coordinates": pa.bool_(), "cut_tokens": pa.int32(),     # for 02 alone
         "ends_added": pa.int32(), "put_in": pa.list_(pa.string()), "tells_day": pa.bool_()}
BATCH_BYTES = 2**22                       # of a file's batches, of which few are in memory at once


def names_of(specs: list[dict]) -> list[str]:
    """A name for each data set, by which its samples are called: its file's, numbered where that is taken."""
    names: list[str] = []
    for spec in specs:
        stem = Path(spec["path"]).stem
        free = [stem, *(f"{stem}.{number}" for number in range(2, len(names) + 2))]
        names.append(next(name for name in free if name not in names))
    return names


# ---- which ones ----


def hold_out(table: pa.Table, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of (train, held out): a seeded choice of `size` samples, or of that share of them below 1.

    Samples of one row, or with a picture in common, stay on one side: so it may be fewer than `size`, which
    is said.
    """
    wanted = max(1, round(size * len(table))) if size < 1 else size
    firsts, group_of, sizes = np.unique(groups_of(table), return_inverse=True, return_counts=True)
    order = array("q", range(len(firsts)))
    random.Random(seed).shuffle(order)
    held, number = np.zeros(len(firsts), bool), 0
    for group in order:
        if number + sizes[group] <= wanted:
            held[group] = True
            number += sizes[group]
    if number in (0, len(table)):
        which, least = "all" if number else "none", sizes.min()
        instead = f"val_set_size: {least}, or " if least < len(table) else ""
        raise StageError(f"val_set_size: {size}: {which} of the {len(table)} samples would be held out "
                         "(those that share a picture stay together)",
                         f"{instead}name a file of its own under test_datasets")
    if number < wanted:
        terminal.say(f"val_set_size: {size}: {number} of {wanted} samples are held out, since those that "
                     "share a row or picture stay together")
    return np.flatnonzero(~held[group_of]), np.flatnonzero(held[group_of])


def groups_of(table: pa.Table) -> np.ndarray:
    """For each sample the first one of those it must stay with: union-find over rows and pictures."""
    parent = array("q", range(len(table)))

    def leader(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    media, shown_by = inner(table["media"])
    hashes = numbered(pc.struct_field(media, "sha256"))
    for places, keys in ((np.arange(len(table)), rows_of(table)), (shown_by, hashes)):
        _, firsts, key_of = np.unique(keys, return_index=True, return_inverse=True)
        first = places[firsts[key_of]]
        for pair in zip(places[places != first].tolist(), first[places != first].tolist()):
            low, high = sorted(map(leader, pair))
            parent[high] = low
    return np.fromiter(map(leader, range(len(table))), np.int64, len(table))


def trained_too(table: pa.Table, train: np.ndarray, held_out: np.ndarray) -> int:
    """How many held-out samples stand among those of training as well, with the same text and media."""
    held = pc.unique(table["text"].take(pa.array(held_out)))
    texts = pc.fill_null(pc.index_in(table["text"], held), -1).to_numpy()
    hashes = numbered(pc.struct_field(inner(table["media"])[0], "sha256"))
    ends = np.append(0, np.cumsum(pc.list_value_length(table["media"]).to_numpy()))

    def content(place: int) -> tuple:
        return texts[place], *hashes[ends[place]:ends[place + 1]].tolist()
    trained = set(map(content, np.unique(train[texts[train] >= 0])))
    return sum(content(place) in trained for place in held_out)


def weighted(parts: list[np.ndarray], names: list[str], specs: list[dict], seed: int) -> np.ndarray:
    """The places of an epoch: of weight 2.5, each twice and a seeded half of the data set a third time."""
    found = []
    for places, name, spec in zip(parts, names, specs):
        times = np.full(len(places), int(spec["weight"]))
        again = round(spec["weight"] % 1 * len(places))
        times[random.Random(f"{seed} {name}").sample(range(len(places)), again)] += 1
        if len(places) and not times.any():
            raise StageError(f"datasets: {spec['path']}: weight {spec['weight']} leaves none of its "
                             f"{terminal.counted(len(places), 'sample')} to train on",
                             "raise that weight, or remove the entry")
        found.append(np.repeat(places, times))
    return np.concatenate(found)


# ---- in numbers ----


def numbered(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each text of a column, the same for the same text."""
    return pc.index_in(column, pc.unique(column)).to_numpy().astype(np.int64)


def inner(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """(the values of a column of lists, one after the other; the place of the list that each is of)."""
    return pc.list_flatten(column), np.repeat(np.arange(len(column)), pc.list_value_length(column))


def rows_of(table: pa.Table) -> np.ndarray:
    """A number for each sample's row, which is the same for all samples of a row."""
    return numbered(table["dataset"]) << 40 | table["row"].to_numpy()


# ---- files ----


def batch_of(samples: list[dict]) -> pa.RecordBatch:
    """Measured samples as Arrow has them."""
    return pa.RecordBatch.from_pylist(samples, schema=pa.schema(SAMPLE | NOTES))


def mapped(batches: Iterable[pa.RecordBatch], path: Path) -> pa.Table:
    """The samples of these batches as a table that stays in its file, which has no name: it goes with it."""
    with pa.ipc.new_stream(path, pa.schema(SAMPLE | NOTES)) as file:
        waiting, size = [], 0
        for batch in batches:
            waiting.append(batch)
            size += batch.nbytes
            if size > BATCH_BYTES:
                file.write(pa.concat_batches(waiting))
                waiting, size = [], 0
        if waiting:
            file.write(pa.concat_batches(waiting))
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    path.unlink()
    return table


def save(table: pa.Table, places: np.ndarray, folder: Path):
    """The chosen samples, as datasets.load_from_disk reads them from the folder that this writes.

    Byte for byte the same for the same samples. One that is there again is called ID~2, ID~3 …
    """
    import datasets
    datasets.disable_progress_bars()
    datasets.Dataset(pa.schema(SAMPLE).empty_table()).save_to_disk(folder, num_shards=1)
    (path,) = folder.glob("*.arrow")                             # of no rows: these are written here
    with pa.ipc.new_stream(path, pa.schema(SAMPLE)) as file:
        for batch in chosen(table.select(list(SAMPLE)), places):
            file.write(batch)
    return datasets.load_from_disk(str(folder))


def chosen(table: pa.Table, places: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The samples at these places, in batches like those of the table."""
    start = 0
    for batch in table.to_batches():
        first, last = np.searchsorted(places, (start, start + len(batch)))
        own = places[first:last] - start
        times = np.arange(len(own)) - np.searchsorted(own, own)
        taken = batch.take(pa.array(own))
        ids = [f"{name}~{n + 1}" if n else name for name, n in zip(taken["sample_id"].to_pylist(), times)]
        yield taken.set_column(0, "sample_id", pa.array(ids, pa.string()))
        start += len(batch)

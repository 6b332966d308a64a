"""sources: the rows of any file, folder or data set of the hub that a recipe names, as they stand in it.

Fork me to: take rows from elsewhere (`rows`); lib/data/files.py reads the kinds of files.
"""
import random
import re
from itertools import chain, compress, islice
from pathlib import Path

from lib.config.paths import BUILDERS, is_data_id
from lib.data.files import Source, numbered, parsed, rows_of_file
from lib.data.hub import loaded, names_in, places, saved
from lib.data.shapes import listed
from lib.media.media import KIND_OF
from lib.run.errors import StageError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")         # of a folder of pictures
FILE_NAME = re.compile(r"(.+)_file_names?")                      # a column of paths, as in image_file_name


def rows(spec: dict) -> Source:
    """The rows of a data set's entry in the recipe."""
    path = Path(spec["path"])
    if not path.exists() and spec["path"] not in BUILDERS and not is_data_id(spec["path"]):
        raise StageError(f"datasets: {path}: no such file or folder",
                         "correct the path (a relative one starts from the current folder)")
    if not path.exists() or spec["data_files"] or spec["name"]:
        return numbered(path, [loaded(spec)])
    if path.is_file():
        return part(rows_of_file(path, spec["ds_type"]), spec)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return numbered(path, saved(path, spec))
    if metadata := next((path / name for name in METADATA if (path / name).is_file()), None):
        return part(described(metadata), spec)
    return numbered(path, [loaded(spec)])


def root(spec: dict) -> Path:
    """The folder that relative media paths start from: media_root, or the data file's own.

    Where data_files lie in several folders, no row tells its own: the current one.
    """
    path = Path(spec["path"])
    if spec["media_root"] or path.is_dir():
        return Path(spec["media_root"] or path)
    beside = {Path(name).parent for name in listed(spec["data_files"] or spec["path"])}
    return beside.pop() if len(beside) == 1 else Path()


def files_of(spec: dict) -> list[Path]:
    """The files and folders here that an entry reads."""
    folder = Path(spec["path"])
    inside = [folder / name if folder.is_dir() else Path(name) for name in listed(spec["data_files"] or [])]
    return [path for path in [folder, *inside] if path.exists()]


def part(found: Source, spec: dict) -> Source:
    """The rows of a file that a split such as train[:1%] takes. A file has no splits: any name will do."""
    names = names_in(spec["split"])
    if not names or all(name == spec["split"] for name in names):
        return found
    taken = [each for _, each in places(spec, {name: len(found) for name in names})]
    return Source(sum(map(len, taken)), lambda: chain.from_iterable(
        islice(found, each.start, each.stop) for each in taken))


def shard(found: Source, spec: dict, seed: int) -> Source:
    """The part of a data set's rows that its entry asks for: one of `shards`, equal but for a row, seeded."""
    if spec["shards"] is None:
        return found
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    taken = bytearray(len(found))
    for place in order[spec["shards_idx"]::spec["shards"]]:
        taken[place] = True
    return Source(sum(taken), lambda: compress(found, taken))


# ---- folders of media ------------------------------------------------------------------------------------


def described(path: Path) -> Source:
    """The rows of a folder's metadata file."""
    found = rows_of_file(path, None)
    return Source(len(found), lambda: ((n, where, named_media(parsed(row))) for n, where, row in found))


def named_media(row):
    """A row of metadata, its columns of file names called by what the files are."""
    if not isinstance(row, dict):
        return row
    found = {}
    for key, value in row.items():
        if key == "file_name" and isinstance(value, str):
            found[KIND_OF.get(Path(value).suffix.lower(), "image")] = value
        else:
            named = FILE_NAME.fullmatch(key)
            found[named[1] if named else key] = value
    return found

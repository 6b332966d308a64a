"""sources: the rows of any file, folder or data set of the hub that a recipe names, as they stand in it.

Fork me to: read another kind of file (`rows_of_file`).
"""
import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, islice
from pathlib import Path

from lib.checks import BUILDERS, is_data_id
from lib.hub import loaded, names_in, places, saved
from lib.media import KIND_OF
from lib.messages import RowError, name_of
from lib.stage import StageError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")         # of a folder of pictures
FILE_NAME = re.compile(r"(.+)_file_names?")                      # a column of paths, as in image_file_name
Row = tuple[int, str, object]


@dataclass(frozen=True)
class Source:
    """Rows in their order, so many of them; each `iter` reads them anew, and keeps none.

    A Row is (its number from 0, where it stands, itself, for `parsed`). Where it stands is its file and line,
    or its file and number where rows have no lines.
    """
    number: int
    read: Callable[[], Iterator[Row]]

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Row]:
        return self.read()


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
    """The folder that relative media paths start from: media_root, or the data file's own."""
    path = Path(spec["path"])
    return Path(spec["media_root"]) if spec["media_root"] else path if path.is_dir() else path.parent


def files_of(spec: dict) -> list[Path]:
    """The files and folders here that an entry reads."""
    folder, given = Path(spec["path"]), spec["data_files"] or []
    inside = [folder / name if folder.is_dir() else Path(name)
              for name in ([given] if isinstance(given, str) else given)]
    return [path for path in [folder, *inside] if path.exists()]


def numbered(path: Path, found: list) -> Source:
    """Rows that have no lines, of several tables or lists."""
    return Source(sum(map(len, found)), lambda: (
        (number, f"{path}: row {number}", row) for number, row in enumerate(chain.from_iterable(found))))


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


def parsed(row):
    """A row as an object: of JSONL files, sources give lines. What is no JSON is a RowError in its place."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {broken(error)}", "mend or remove that line")


def broken(error: Exception) -> str:
    """What is wrong with a JSON text, and at which column."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "the text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


# ---- files -----------------------------------------------------------------------------------------------


def rows_of_file(path: Path, kind: str | None) -> Source:
    """The rows of a file of this kind (None: its name tells), with where they stand."""
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise StageError(f"datasets: {path}: unknown kind of file {path.suffix!r}",
                         "use .json, .jsonl, .parquet, .arrow or a folder written by datasets' save_to_disk")
    if kind == "jsonl":
        return lines(path)
    return listed(path) if kind == "json" else columnar(path, kind)


def lines(path: Path) -> Source:
    """The rows of a JSONL file, as the bytes of their lines."""
    def read() -> Iterator[Row]:
        with path.open("rb") as file:
            held = (line for line in enumerate(file, start=1) if line[1].strip())
            for row, (number, line) in enumerate(held):
                yield row, f"{path}:{number}", line
    with path.open("rb") as file:
        return Source(sum(1 for line in file if line.strip()), read)


def listed(path: Path) -> Source:
    """The rows of a JSON file, which is read whole; some are named .json and hold an object a line."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found = lines(path)
        if len(found) > 1 and not any(isinstance(parsed(row), RowError) for _, _, row in found):
            return found
        line = getattr(error, "lineno", 1)
        raise StageError(f"{path}:{line}: not JSON: {broken(error)}",
                         "mend the file; one object per line belongs in a .jsonl file") from None
    if not isinstance(content, list):
        raise StageError(f"{path}: holds {name_of(content)}, not a list of rows",
                         "wrap the rows in [ ], or use one object per line in a .jsonl file")
    return numbered(path, [content])


def columnar(path: Path, kind: str) -> Source:
    """The rows of a Parquet or Arrow file, of which a batch is in memory at once."""
    import pyarrow.parquet

    def read() -> Iterator[Row]:
        with readable(path, kind):
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256) \
                if kind == "parquet" else arrow_batches(path)
            found = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((number, f"{path}: row {number}", row) for number, row in enumerate(found))
    with readable(path, kind):
        return Source(pyarrow.parquet.read_metadata(path).num_rows if kind == "parquet" else
                      sum(batch.num_rows for batch in arrow_batches(path)), read)


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Inside, a file of columns that isn't whole is a StageError."""
    import pyarrow
    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise StageError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})",
                         "write the file again; a cut download looks like this") from None


def arrow_batches(path: Path) -> Iterator:
    """Record batches of an .arrow file in either of the format's two layouts, stream or file."""
    import pyarrow
    source = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


# ---- folders of media ------------------------------------------------------------------------------------


def described(path: Path) -> Source:
    """The rows of a folder's metadata file."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = numbered(path, [list(csv.DictReader(file))])
    else:
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

"""files: the rows of a file, one by one: of JSONL and JSON, of CSV and TSV, of Parquet and Arrow.

Fork me to: read another kind of file (`rows_of_file`).
"""
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lib.data.shapes import name_of, shortened
from lib.run.errors import RowError, StageError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
            ".parquet": "parquet", ".arrow": "arrow"}
SEPARATORS = {"csv": ",", "tsv": "\t"}
csv.field_size_limit(2**31 - 1)           # a cell may hold a whole conversation, or a picture in base64
Row = tuple[int, str, object]
READ_BYTES = 2**24                        # of a Parquet file at a time: repeated media are many times more


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


def rows_of_file(path: Path, kind: str | None) -> Source:
    """The rows of a file of this kind (None: its name tells), with where they stand."""
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise StageError(f"datasets: {path}: unknown kind of file {path.suffix!r}",
                         "use .json, .jsonl, .csv, .tsv, .parquet, .arrow or a folder written by datasets' "
                         "save_to_disk")
    if kind == "jsonl":
        return lines(path)
    if kind in SEPARATORS:
        return separated(path, SEPARATORS[kind])
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


def separated(path: Path, separator: str) -> Source:
    """The rows of a CSV or TSV file, whose first line names its columns. An empty cell is null."""
    def read() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, delimiter=separator, strict=True)
            try:
                columns = next(cells, [])
                if len(set(columns)) < len(columns):
                    raise csv.Error(f"its first line names a column twice: {shortened(', '.join(columns))}")
                for number, row in enumerate(filter(None, cells)):
                    yield number, f"{path}: row {number}", in_columns(row, columns)
            except (UnicodeDecodeError, csv.Error) as error:
                raise StageError(f"{path}:{cells.line_num}: not rows of cells: {broken(error)}",
                                 'save it as UTF-8, cells that hold a separator, newline or " within quotes'
                                 ) from None
    return Source(sum(1 for _ in read()), read)


def in_columns(row: list[str], columns: list[str]):
    """A row of cells as an object, a RowError where it has another number of them than there are columns."""
    if len(row) != len(columns):
        return RowError(f"{len(row)} cells, and the first line names {len(columns)} columns",
                        "put a cell that holds a separator within quotes, or write each empty cell")
    return {name: cell or None for name, cell in zip(columns, row)}


def columnar(path: Path, kind: str) -> Source:
    """The rows of a Parquet or Arrow file, of which a batch is in memory at once."""
    def read() -> Iterator[Row]:
        with readable(path, kind):
            batches = (parquet_batches if kind == "parquet" else arrow_batches)(path)
            found = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((number, f"{path}: row {number}", row) for number, row in enumerate(found))
    with readable(path, kind):
        return Source(pyarrow.parquet.read_metadata(path).num_rows if kind == "parquet" else
                      sum(batch.num_rows for batch in arrow_batches(path)), read)


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Inside, a file of columns that isn't whole is a StageError."""
    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise StageError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})",
                         "write the file again; a cut download looks like this") from None


def parquet_batches(path: Path) -> Iterator:
    """Record batches of a Parquet file, with fewer rows where these hold media."""
    file = pyarrow.parquet.ParquetFile(path)
    size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups))
    return file.iter_batches(batch_size=max(1, min(256, READ_BYTES * file.metadata.num_rows // max(1, size))))


def arrow_batches(path: Path) -> Iterator:
    """Record batches of an .arrow file in either of the format's two layouts, stream or file."""
    source = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


def numbered(path: Path, found: list) -> Source:
    """Rows that have no lines, of several tables or lists."""
    return Source(sum(map(len, found)), lambda: (
        (number, f"{path}: row {number}", row) for number, row in enumerate(chain.from_iterable(found))))


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

"""sources: the rows of any file or folder that a recipe names, as they stand in it.

Fork me to: read another kind of file (`rows`).
"""
import json
from collections.abc import Iterator
from pathlib import Path

from lib.messages import RowError, name_of
from lib.stage import StageError


def rows(spec: dict) -> Iterator[tuple[int, str, object]]:
    """(row number from 0, where it stands, the row or a RowError) of a file or saved data set.

    Where a row stands is its file and line, or its file and number where rows have no lines.
    """
    path = Path(spec["path"])
    if path.is_dir():
        found = saved(path, spec["split"])
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from lines(path)
        return
    elif path.suffix == ".json":
        found = listed(path)
    elif path.suffix in (".parquet", ".arrow"):
        found = columnar(path)
    else:
        raise StageError(f"datasets: {path}: unknown kind of file {path.suffix!r}",
                         "use .json, .jsonl, .parquet, .arrow or a folder written by datasets' save_to_disk")
    for number, row in enumerate(found):
        yield number, f"{path}: row {number}", row


def root(spec: dict) -> Path:
    """The folder that relative media paths start from: the data file's own."""
    path = Path(spec["path"])
    return path if path.is_dir() else path.parent


def lines(path: Path) -> Iterator[tuple[int, str, object]]:
    """The rows of a JSONL file; a line that is no JSON is a RowError in its place."""
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                value = RowError(f"not JSON: {broken(error)}", "mend or remove that line")
            yield row, f"{path}:{number}", value
            row += 1


def listed(path: Path) -> list:
    """The rows of a JSON file."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise StageError(f"{path}:{line}: not JSON: {broken(error)}",
                         "mend the file; one object per line belongs in a .jsonl file") from None
    if not isinstance(content, list):
        raise StageError(f"{path}: holds {name_of(content)}, not a list of rows",
                         "wrap the rows in [ ], or use one object per line in a .jsonl file")
    return content


def broken(error: Exception) -> str:
    """What is wrong with a JSON text, and at which column."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "the text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def columnar(path: Path) -> Iterator[dict]:
    """The rows of a Parquet or Arrow file."""
    import pyarrow
    import pyarrow.parquet
    try:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        else:
            batches = arrow_batches(path)
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise StageError(f"{path}: not a readable {path.suffix[1:]} file ({str(error).splitlines()[0]})",
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


def saved(path: Path, split: str | None) -> Iterator[dict]:
    """The rows of a folder that datasets' save_to_disk wrote."""
    import datasets
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError):
        raise StageError(f"datasets: {path} is a folder, but not one written by datasets' save_to_disk",
                         "name the data file in it, or write the folder with save_to_disk") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise StageError(f"datasets: {path} has the splits {', '.join(found)}, not {split!r}",
                             f"write split: {next(iter(found))}")
        found = found[split]
    for column, feature in found.features.items():      # media stay bytes, for lib/media.py to decode
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, (datasets.Image, datasets.Audio, datasets.Video)):
            plain = type(inner)(decode=False)
            found = found.cast_column(column, plain if inner is feature else datasets.List(plain))
    yield from found

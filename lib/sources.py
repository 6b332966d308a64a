"""sources: rows from any file or folder that a recipe names, normalised to messages and media.

`rows(spec)` yields what stands in the file; `normalise(row, spec)` makes of it the one shape that the rest of the kit knows:
messages with typed content, and the media that fill their placeholders in order.
"""
import json
from collections.abc import Iterator
from pathlib import Path

from lib.stage import StageError

MEDIA_COLUMNS = {"images": "image", "image": "image"}
ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
    """A row that can't be used: RowError(reason, fix), both one line."""

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        self.reason, self.fix = reason, fix


def rows(spec: dict) -> Iterator[tuple[int, dict | RowError]]:
    """(row number from 0, the row or what is wrong with it) of a JSON, JSONL, Parquet, Arrow file or saved data set."""
    path = Path(spec["path"])
    if not path.exists():
        raise StageError(f"datasets: {path}: no such file or folder", "correct the path (relative to the current folder)")
    if path.is_dir():
        yield from enumerate(_saved(path, spec["split"]))
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(path)
    elif path.suffix == ".json":
        yield from enumerate(_json(path))
    elif path.suffix in (".parquet", ".arrow"):
        yield from enumerate(_columnar(path))
    else:
        raise StageError(f"datasets: {path}: unknown kind of file {path.suffix!r}",
                         "use .json, .jsonl, .parquet, .arrow or a folder written by datasets' save_to_disk")


def files(spec: dict) -> list[Path]:
    """The files whose content decides what `rows` yields."""
    path = Path(spec["path"])
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def root(spec: dict) -> Path:
    """The folder that relative media paths start from: the data file's own."""
    path = Path(spec["path"])
    return path if path.is_dir() else path.parent


def _jsonl(path: Path) -> Iterator[tuple[int, dict | RowError]]:
    with path.open(encoding="utf-8-sig") as lines:
        row = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield row, json.loads(line)
            except json.JSONDecodeError as error:
                yield row, RowError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}",
                                    "mend or remove that line")
            row += 1


def _json(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise StageError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}",
                         "mend the file; one object per line belongs in a .jsonl file") from None
    if not isinstance(content, list):
        raise StageError(f"{path}: holds a {type(content).__name__}, not a list of rows",
                         "wrap the rows in [ ], or use one object per line in a .jsonl file")
    return content


def _columnar(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet
    try:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        else:
            batches = _arrow_batches(path)
        for batch in batches:
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise StageError(f"{path}: not a readable {path.suffix[1:]} file ({str(error).splitlines()[0]})",
                         "write the file again; a cut download looks like this") from None


def _arrow_batches(path: Path):
    """Record batches of an .arrow file in either of the format's two layouts, stream or file."""
    import pyarrow
    source = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


def _saved(path: Path, split: str | None) -> Iterator[dict]:
    import datasets
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise StageError(f"datasets: {path} is a folder, but not one written by datasets' save_to_disk",
                         "name the data file in it, or write the folder with save_to_disk") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise StageError(f"datasets: {path} has the splits {', '.join(saved)}, not {split!r}",
                             f"write split: {next(iter(saved))}")
        saved = saved[split]
    for column, feature in saved.features.items():     # bytes as they lie in the file, decoded by lib/media.py
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):
            plain = datasets.Image(decode=False)
            saved = saved.cast_column(column, plain if inner is feature else datasets.List(plain))
    yield from saved


# ------------------------------------------------------------------------------------------------ one shape

def normalise(row, spec: dict) -> tuple[list[dict], list]:
    """(messages, media sources) of a row; messages have a role and typed content, media stand in placeholder order.

    Inline media (`{"type": "image", "path": …}`) keep their place; those listed in a column fill the bare
    placeholders over all turns, or go before the first user text where the row has no placeholder.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, not {type(row).__name__}", "write {\"messages\": […]}")
    key = spec["field_messages"] or "messages"
    if not isinstance(row.get(key), list) or not row[key]:
        raise RowError(f"no list of messages under {key!r} (the row has: {', '.join(map(str, row)) or 'nothing'})",
                       "write the conversation there, or name its key with field_messages")
    messages = [_message(message, number) for number, message in enumerate(row[key])]
    listed = [medium for column in MEDIA_COLUMNS for medium in _listed(row.get(column))]
    return messages, _fill(messages, listed)


def _message(message, number: int) -> dict:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is a {type(message).__name__}, not an object", "write {\"role\", \"content\"}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"message {number} has the role {role!r}", f"use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RowError(f"message {number} ({role}) has no content", "write a string or a list of typed parts")
    return {"role": role, "content": [_part(part, number) for part in content]}


def _part(part, number: int) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RowError(f"message {number} has a text part without text", "write {\"type\": \"text\", \"text\": …}")
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        source = next((part[k] for k in ("image", "path", "url", "bytes") if part.get(k) is not None), None)
        if part.get("base64") is not None:
            source = f"data:;base64,{part['base64']}"
        return {"type": "image", "source": source}
    raise RowError(f"message {number} has a part of type {kind!r}", "use text or image")


def _listed(value) -> list:
    """A media column's value as a list: one, several, empty or null."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fill(messages: list[dict], listed: list) -> list:
    """The media of all placeholders in order; leaves bare `{"type": "image"}` parts in the messages."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    bare = [part for part in parts if part["source"] is None]
    if listed and not bare and not parts:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise RowError("pictures, but no user message to put them in", "add a user message")
        first["content"][:0] = [{"type": "image", "source": medium} for medium in listed]
        parts = first["content"][:len(listed)]
    elif len(bare) != len(listed):
        raise RowError(f"{len(bare)} image placeholders, but {len(listed)} listed pictures",
                       "write one {\"type\": \"image\"} part for each entry of the images column")
    else:
        for part, medium in zip(bare, listed):
            part["source"] = medium
    return [part.pop("source") for part in parts]

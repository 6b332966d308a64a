"""The ledger of a run folder: what each stage read and what it wrote, as facts that can be compared.

Every finished stage folder holds `stage.json`:

    stage    its stem, for example "02_data"
    reads    knobs {knob: value}, upstream {stem: digest}, source {file: sha256}, outside {path: stamp}
    wrote    {file: stamp}; a stamp is {bytes, mtime_ns, sha256}

A stamp is trusted where size and time still agree, and the file is hashed again where they don't: so a copied
or touched file is no change. The code that a stage runs is hashed by code.py; what to do about a change
is decided in decision.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from lib.run.errors import StageError

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("01_config", "02_data", "03_load_model", "04_lora", "05_train", "06_save")
UPSTREAM = {  # whose outputs a stage reads; of 01's, the knobs are followed one by one
    "01_config": (),
    "02_data": (),
    "03_load_model": ("02_data",),
    "04_lora": ("03_load_model",),
    "05_train": ("02_data", "03_load_model", "04_lora"),
    "06_save": ("02_data", "03_load_model", "04_lora", "05_train"),
}
HOOK = re.compile(r"(.+\.py):([A-Za-z_]\w*)")  # a value that names a user's function (lib/training/hooks.py)
MARKS = ("stage.json", "started.json", "lock")  # the ledger's own files in a stage folder are nobody's output


# ---- files ----


def read_json(path: Path):
    """The parsed file; StageError where it is gone or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        stem = path.parent.name.partition(".")[0]
        word = "is gone" if isinstance(error, FileNotFoundError) else f"is not whole JSON: {error}"
        raise StageError(f"{path} {word}", f"start {stem}.py again with --force") from None


def in_lines(rows: Iterable[dict]) -> str:
    """The rows as JSONL: a line for each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path: Path, content) -> None:
    """Write a JSON file that is whole on the disk or, if this is cut off, as it was before."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole on the disk or, if this is cut off, as it was before."""
    half = path.with_name(f".{path.name}.half")  # hidden: what a full disk leaves of it is nobody's output
    half.write_text(text, encoding="utf-8")
    sync(half)
    half.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stamp(path: Path, sha256: str | None = None) -> dict:
    """{bytes, mtime_ns, sha256} of a file; sha256: given by a caller that has hashed the bytes already."""
    stat = path.stat()  # before hashing, so that a file which is written meanwhile is noticed
    sha256 = sha256_of(path) if sha256 is None else sha256
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fate(path: Path, then: dict) -> str:
    """"" where the file is as it was stamped, else "is gone" or "changed"."""
    if not path.is_file():
        return "is gone"
    now = path.stat()
    if now.st_size != then["bytes"]:
        return "changed"
    same = now.st_mtime_ns == then["mtime_ns"] or stamp(path)["sha256"] == then["sha256"]
    return "" if same else "changed"


def files_under(folder: Path) -> list[str]:
    """Relative paths of the files below a folder, sorted; links are followed, hidden names left out."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen or any(part.startswith(".") for part in Path(where).relative_to(folder).parts):
            folders.clear()  # a link back up, or a tool's own folder
            continue
        seen.add(real)
        found += [Path(where, name).relative_to(folder).as_posix() for name in names if name[0] != "."]
    return sorted(found)


# ---- what a stage read ----


def knobs(run: Path, stem: str) -> tuple[dict, dict]:
    """Two dicts: the knobs that this stage reads, and those of them that are part of the run's identity."""
    values, declared = (read_json(run / "01_config" / name) for name in ("config.json", "stages.json"))
    mine = {knob: values[knob] for knob in declared[stem]}
    return mine, {knob: value for knob, value in mine.items() if knob not in declared["not_identity"]}


def name_of(path: Path) -> str:
    """A file's name in a ledger: relative to the kit if it lies inside, so that the kit may be moved."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def outside(path: Path, sha256: str | None = None) -> dict[str, dict]:
    """{name: stamp} of a file, or of all files in a folder, and the folder's list of names.

    By the list, a new file is noticed.
    """
    name = name_of(path)
    if not path.is_dir():
        return {name: stamp(path, sha256)}
    names = files_under(path)
    return {f"{name}/": {"names": names}} | {f"{name}/{file}": stamp(path / file) for file in names}


def outside_changes(then: dict[str, dict]) -> list[str]:
    """One line for each outside file that is no longer what the stage read."""
    lines = []
    for name, stamped in then.items():
        path = ROOT / name  # an absolute name replaces ROOT
        if "names" in stamped:
            known = set(stamped["names"])
            lines += [f"{name}{file} is new" for file in files_under(path) if file not in known]
        elif word := fate(path, stamped):
            lines.append(f"{name} {word}")
    return lines


def changes(then: dict, now: dict) -> list[str]:
    """One line for each difference between two `reads` in knobs, upstream outputs and own source."""
    lines = []
    for knob in sorted(then["knobs"].keys() | now["knobs"].keys()):
        before, after = (_text_of_knob(reads["knobs"], knob) for reads in (then, now))
        if before != after:
            lines.append(f"{knob} changed: {before:.80} -> {after:.80}")
    for stem in sorted(then["upstream"].keys() | now["upstream"].keys()):
        if then["upstream"].get(stem) != now["upstream"].get(stem):
            lines.append(f"the outputs of {stem} changed")
    return lines + [f"{file} was edited" for file in edited_sources(then["source"], now["source"])]


def _text_of_knob(knobs: dict, knob: str) -> str:
    """A knob's value as JSON, so that a tuple equals the list that was read back."""
    return json.dumps(knobs[knob], ensure_ascii=False, sort_keys=True) if knob in knobs else "unknown"


def edited_sources(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The source files in which two starts differ."""
    return sorted({file for file, _ in then.items() ^ now.items()})


# ---- what a stage wrote ----


def finished(folder: Path) -> bool:
    """Whether a stage folder is whole."""
    return (folder / "stage.json").is_file()


def outputs(folder: Path, volatile: tuple[str, ...]) -> dict[str, dict]:
    """{file: stamp} of a stage folder, without the files, folders and globs in `volatile`."""
    found = {}
    for file in files_under(folder):
        names = [file, *(parent.as_posix() for parent in Path(file).parents)]
        if file not in MARKS and not any(fnmatch(name, glob) for name in names for glob in volatile):
            found[file] = stamp(folder / file)
    return found


def edited_outputs(folder: Path) -> list[str]:
    """One line for each output that is no longer what the stage wrote."""
    wrote = read_json(folder / "stage.json")["wrote"]
    fates = {file: fate(folder / file, stamped) for file, stamped in wrote.items()}
    return [f"{folder / file} {word} since {folder.name} wrote it" for file, word in fates.items() if word]


def digest(folder: Path) -> str:
    """One sha256 over the names and hashes of all that a finished stage wrote."""
    wrote = read_json(folder / "stage.json")["wrote"]
    lines = "".join(f"{file} {wrote[file]['sha256']}\n" for file in sorted(wrote))
    return hashlib.sha256(lines.encode()).hexdigest()

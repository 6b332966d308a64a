"""Bad input in tables: a row says what somebody did, and the two lines that it must end with.

    CASES = (
        Bad("a missing recipe", ["recipes/nope.yaml"], "recipes/nope.yaml: no such recipe", "ls recipes/"),
        Bad("an empty recipe", ["r.yaml"], "r.yaml: the recipe is empty", "write `key: value` lines…", {"r.yaml": ""}),
    )

    @bad_input(CASES)
    def test_a_bad_recipe_is_a_two_line_error(case, tmp_path):
        harness.check(case, "01_config", tmp_path)

The folder may hold more than the row's own files: a run finished by earlier stages, say, copied there by a fixture.
"""

import contextlib
import hashlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lib.stage import ROOT, StageError


@dataclass(frozen=True)
class Bad:
    """A row: its name, the words after the script's name, the two lines ("…" stands for any text within a line), and
    the files it needs, {path: text, bytes, or a function that is called with the path}."""

    name: str
    argv: list[str]
    what: str
    fix: str
    files: dict[str, str | bytes | Callable[[Path], None]] = field(default_factory=dict)


def bad_input(cases):
    """The decorator that runs a test once for each row."""
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two rows have the same name"
    return pytest.mark.parametrize("case", cases, ids=names)


def check(case: Bad, script: str, folder: Path, may_write: tuple[str, ...] = ()) -> None:
    """Nothing; `main` of a numbered script stops with the row's two lines, every file of the folder is as it was, and
    none was added beyond the globs in `may_write` (relative to the folder)."""
    write(folder, case.files)
    before = contents(folder)
    error = refusal(script, case.argv, folder)
    assert_two_lines((error.what, error.fix), case)
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before, "the refusal lost or changed a file"
    added = {path for path in after.keys() - before.keys() if not any(Path(path).match(glob) for glob in may_write)}
    assert not added, "the refusal left files behind"


def check_process(case: Bad, script: str, folder: Path) -> None:
    """Nothing; the script as a process says the row's two lines on stderr, and nothing else, and exits with 1."""
    write(folder, case.files)
    done = process(script, case.argv, folder)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("  fix: "), done.stderr
    assert_two_lines((lines[0].removeprefix("error: "), lines[1].removeprefix("  fix: ")), case)


def refusal(script: str, argv: list[str], folder: Path) -> StageError:
    """The StageError with which `main(argv)` of a script, called in this process from a folder, must stop."""
    with contextlib.chdir(folder), pytest.raises(StageError) as caught:
        importlib.import_module(script).main(argv)
    return caught.value


def process(script: str, argv: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    """A script, finished as a process of its own, with its output as text."""
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *argv], cwd=folder, capture_output=True, text=True,
                          encoding="utf-8", env=os.environ | one_thread | env)


def write(folder: Path, files: dict) -> None:
    """Nothing; the row's files are in the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_two_lines(said: tuple[str, str], case: Bad) -> None:
    """Nothing; what was said is what the row expects."""
    for line, expected in zip(said, (case.what, case.fix), strict=True):
        pattern = re.escape(expected).replace("…", "[^\n]*")
        assert re.fullmatch(pattern, line), f"\n  said:     {line}\n  expected: {expected}"

"""Bad input in tables: a row says what somebody did, and the two lines in which it must end.

    CASES = (
        Bad("a missing recipe", ["nope.yaml"], "nope.yaml: no such recipe", "ls recipes/"),
        Bad("an empty recipe", ["r.yaml"], "r.yaml: the recipe is empty", "write …", files={"r.yaml": ""}),
    )

    @bad_input(CASES)
    def test_a_bad_recipe_ends_in_two_lines(case, tmp_path):
        harness.check(case, "01_config", tmp_path)

The folder may already hold more than the row's own files, such as a run that earlier stages have finished.
"""

import contextlib
import fnmatch
import hashlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lib.run.errors import StageError
from lib.run.stage import ROOT


@dataclass(frozen=True)
class Bad:
    """A row of a table of bad input.

    `argv` are the words after the script's name. In `what` and `fix`, the two lines, "…" stands for any text.
    `files` are written first: {path: text, bytes, or a function that is called with the path}.
    """

    name: str
    argv: list[str]
    what: str
    fix: str
    files: dict[str, str | bytes | Callable[[Path], None]] = field(default_factory=dict)


def bad_input(cases: Iterable[Bad]):
    """The decorator that runs a test once for each row."""
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two rows have the same name"
    return pytest.mark.parametrize("case", cases, ids=names)


def check(case: Bad, script: str, folder: Path, may_write: Iterable[str] = ()) -> None:
    """Assert that the script, called in this process, stops with the row's two lines and loses nothing.

    Every file of the folder is as it was and none is new, but for the globs in `may_write`: relative to the
    folder, as "runs/*.partial/*", which lets a stage leave a half-written folder behind.
    """
    write(folder, case.files)
    before = contents(folder, but=may_write)
    error = refusal(script, case.argv, folder)
    assert_two_lines(error.what, error.fix, case)
    assert contents(folder, but=may_write) == before, "the refusal changed, lost or left files"


def check_process(case: Bad, script: str, folder: Path) -> None:
    """Assert that the script's process says the row's two lines on stderr, nothing else, and exits with 1."""
    write(folder, case.files)
    done = process(script, case.argv, folder)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("  fix: "), done.stderr
    assert_two_lines(lines[0].removeprefix("error: "), lines[1].removeprefix("  fix: "), case)


def refusal(script: str, argv: list[str], folder: Path) -> StageError:
    """The StageError with which `main(argv)` of a script stops when it is called from a folder."""
    with contextlib.chdir(folder), pytest.raises(StageError) as caught:
        importlib.import_module(script).main(argv)
    return caught.value


def process(script: str, argv: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    """A numbered script that has ended as a process of its own, with what it said as text."""
    command = [sys.executable, ROOT / f"{script}.py", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | env
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", env=env)


def write(folder: Path, files: dict) -> None:
    """Write the files into the folder: each a text, bytes, or a function that is given its path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder: Path, but: Iterable[str] = ()) -> dict[str, str]:
    """{relative path: sha256} of the files under a folder that match no glob of `but`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, glob) for glob in but):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_two_lines(what: str, fix: str, case: Bad) -> None:
    """Assert that the two lines are the row's."""
    for said, expected in ((what, case.what), (fix, case.fix)):
        pattern = re.escape(expected).replace("…", "[^\n]*")
        assert re.fullmatch(pattern, said), f"\n  said:     {said}\n  expected: {expected}"

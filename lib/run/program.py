"""A stage as a program: its command line, its run folder, and how it stops."""

import argparse
import errno
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.run import folder, ledger, terminal, versions
from lib.run.errors import StageError

LATEST = Path("runs/latest")
NO_ROOM = {
    errno.ENOSPC: ("no space left", "free some space"),
    errno.EDQUOT: ("no quota left", "free some space"),
    errno.EFBIG: ("a file of this size is not allowed", "raise `ulimit -f`"),
}


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser for the run folder and --force, whose help is the script's docstring."""
    # The run is positional, because torchrun matches prefixes of its own flags: --run or --log is ambiguous.
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", nargs="?", help=f"the run folder; left out, the one named in {LATEST}")
    parser.add_argument("--force", action="store_true", help="run in any case; what it replaces is STEM.old")
    return parser


def resolve_run(given: str | None) -> Path:
    """The run folder: the given one, or the one that runs/latest names."""
    fix = "make one: python 01_config.py recipes/demo.yaml runs/demo"
    if given is None and not LATEST.is_file():
        raise StageError(f"no run folder given, and there is no {LATEST} in {Path.cwd()}", fix)
    run = Path(LATEST.read_text(encoding="utf-8").strip() if given is None else given)
    if not run.is_dir():
        named = f"named in {LATEST}" if given is None else "given on the command line"
        raise StageError(f"{run}, {named}, is no run folder", fix)
    if given is None:
        terminal.say(f"{run}: the run folder that 01_config.py wrote last")
    return run


def remember_latest(run: Path) -> None:
    """Write the run folder's name into runs/latest, which scripts take when they are given none."""
    LATEST.parent.mkdir(exist_ok=True)
    ledger.write_whole(LATEST, f"{run}\n")


def command(stem: str, run: Path) -> str:
    """The command that starts a stage: 01 with the recipe and overrides in its ledger, 05 with its ranks.

    The script is named as this one was, which may lie in another folder than the current one.
    """
    script, here = f"{stem}.py", Path(sys.argv[0])
    if here.stem in ledger.STAGES:
        script = shlex.quote(str(here.with_name(script)))
    if stem == "01_config":
        given = {"recipe": "RECIPE", "overrides": []}
        if ledger.finished(run / stem):
            given = ledger.read_json(run / stem / "stage.json")["reads"]["knobs"]
        return f"python {script} {shlex.join([given['recipe'], str(run), *given['overrides']])}"
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1") if stem == "05_train" else "1"  # torchrun sets it
    launcher = "python" if ranks == "1" else f"torchrun --nproc-per-node {ranks}"
    return f"{launcher} {script} {shlex.quote(str(run))}"


@dataclass
class Asked:
    """The number of the signal that asked for a stop; 0: none did."""

    signal: int = 0


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """An Asked. Inside, SIGINT (Ctrl-C) and SIGTERM are only noted: a loop then stops where nothing is lost.

    A second Ctrl-C stops at once, but not under torchrun, which sends its workers a signal that the terminal
    has sent them already.
    """
    asked = Asked()

    def note(number: int, _frame) -> None:
        if number == asked.signal == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        asked.signal = number
        if not terminal.QUIET:  # rich may be in the middle of a line
            os.write(2, b"\nstopping after this step\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(main) -> None:
    """Run main() as a program: a mistake that its user can mend ends in two lines, without a traceback.

    Exit codes: 1 for such mistakes, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output.
    """
    try:
        versions.refuse_old()
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `02_data.py --show 3 | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        _stop(_interrupted(), code, quiet=terminal.QUIET)  # the first rank speaks for all
    except BaseException as error:  # goes on upwards, but for what a user can mend
        while error is not None:
            if isinstance(error, StageError):
                _stop(error, 1)
            if number := _no_room(error):
                _stop(_full_disk(error, number), 1)
            error = error.__cause__  # libraries wrap what the function that they called has raised
        raise


def _stop(error: StageError, code: int, quiet: bool = False) -> None:
    """Print an error's two lines on stderr and exit with the code."""
    if not quiet:
        terminal.error(error.what, error.fix)
    sys.exit(code)


def _interrupted() -> StageError:
    """The error that says what a Ctrl-C has left, and how to go on."""
    for path in folder.being_written():
        stem = path.name.removesuffix(".partial")
        again = command(stem, path.parent)
        if checkpoint := folder.newest_checkpoint(path):
            return StageError(f"{stem} interrupted: {checkpoint.name} is kept", f"go on from it: {again}")
        return StageError(f"{stem} interrupted: what it wrote counts for nothing", f"start again: {again}")
    return StageError("interrupted: nothing was being written", "the same command starts again")


def _no_room(error: BaseException) -> int | None:
    """The errno of a write that failed for lack of room, by the error's number or its words; else None."""
    given = getattr(error, "errno", None)
    return next((number for number in NO_ROOM if number == given or os.strerror(number) in str(error)), None)


def _full_disk(error: BaseException, number: int) -> StageError:
    """The error that says which file system is full, and what to do."""
    written = [getattr(error, "filename", None), *folder.being_written(), Path.cwd()]
    path = Path(next(name for name in written if name))
    there = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free_mib = shutil.disk_usage(there).free / 2**20
    words, fix = NO_ROOM[number]
    what = f"{words} on the file system of {path}: {free_mib:.1f} MiB free"
    kept = next(filter(None, map(folder.newest_checkpoint, folder.being_written())), None)
    go_on = f": it goes on from {kept.name}" if kept else ""
    return StageError(what, f"{fix} and run the same command again{go_on}")

"""The folders of a stage, written and moved so that a kill or a power cut at any moment loses nothing.

    RUN/STEM.partial      being written, under a lock; with stage.json in it: whole, the next start renames it
    RUN/STEM              finished
    RUN/STEM.old          what --force replaced
    RUN/STEM.discarded    what an ordinary new run replaced: removed as soon as the new folder is in place
"""

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path

from lib.run import ledger, terminal
from lib.run.errors import StageError

SUMS = "SHA256SUMS"
_locks = {}  # {partial folder: open lock file}, of this process


def partial(run: Path, stem: str) -> Path:
    """Where a stage writes until it is finished."""
    return run / f"{stem}.partial"


def lock(path: Path) -> None:
    """Keep other processes from writing the folder, until `unlock` or the end of this process."""
    unlock(path)  # a test that starts a stage twice in one process may still hold the first start's lock
    file = (path / "lock").open("ab+", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode().strip()
        fix = "wait for it, or stop it and start again"
        raise StageError(f"{path} is being written by {holder}", fix) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        terminal.warn(f"this file system has no locks: see that only one process writes {path}")
    name = path / "lock"
    if not name.exists() or not os.path.samestat(name.stat(), os.fstat(file.fileno())):
        raise StageError(f"{path} was put in its place by another process just now", "start again")
    _locks[path] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def unlock(path: Path) -> None:
    """Let other processes write the folder again."""
    if file := _locks.pop(path, None):
        file.close()


def being_written() -> list[Path]:
    """The folders that this process has locked."""
    return list(_locks)


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a 05_train folder, whole or damaged, the newest one first."""
    named = (found for found in path.glob("checkpoints/step-*") if found.name[5:].isdigit())
    return sorted(named, key=lambda found: -int(found.name[5:]))


def newest_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint in a 05_train folder that is as it was written, or None."""
    return next((found for found in checkpoints(path) if not damage(found)), None)


def seal(path: Path) -> None:
    """Write SHA256SUMS over a folder's files, which `sha256sum -c` reads, and flush all of it to the disk."""
    lines = [f"{ledger.sha256_of(file)}  {file.name}\n" for file in sorted(path.iterdir())]
    (path / SUMS).write_text("".join(lines), encoding="utf-8")
    sync_tree(path)


def damage(path: Path) -> str:
    """"" where a sealed folder is as it was written, else what is wrong with it."""
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
        files = {file.name for file in path.iterdir() if file.name[0] != "."} - {SUMS}
        for name in sorted(files | sums.keys()):
            if name not in files:
                return f"{name} is gone"
            if ledger.sha256_of(path / name) != sums.get(name):
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{SUMS} is gone"
    except (OSError, ValueError) as error:                         # a disk that can't read it; no text
        return str(error)
    return "" if sums else f"{SUMS} is empty"


def sync_tree(path: Path) -> None:
    """Flush everything in a folder to the disk, and the folder's own name: so it survives a power cut."""
    for where, _, names in os.walk(path):
        for each in (*(Path(where, name) for name in names), Path(where)):
            if not each.is_symlink():
                ledger.sync(each)
    ledger.sync(path.parent)


def heal(run: Path, stem: str) -> None:
    """Put in place what a kill left between stage.json and the rename; StageError while the stage runs."""
    path = partial(run, stem)
    if path.is_dir():
        lock(path)
        if ledger.finished(path):
            put_in_place(run, stem)
        unlock(path)
    _tidy(run, stem)


def put_in_place(run: Path, stem: str) -> None:
    """Rename STEM.partial to STEM. What was STEM is removed, or becomes STEM.old if --force was given."""
    path, final = partial(run, stem), run / stem
    if final.exists():
        # Without a ledger it is not the kit's own folder, so not the kit's to throw away.
        keep = ledger.read_json(path / "stage.json")["forced"] or not ledger.finished(final)
        set_aside(final, run / f"{stem}.{'old' if keep else 'discarded'}")
    path.rename(final)
    ledger.sync(run)
    _tidy(run, stem)


def set_aside(path: Path, aside: Path) -> None:
    """Give the folder the other name, and remove what had that name."""
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def _tidy(run: Path, stem: str) -> None:
    """Remove the marks of the start from a finished folder, and the discarded folder beside it."""
    if ledger.finished(run / stem):
        for name in ("lock", "started.json"):
            (run / stem / name).unlink(missing_ok=True)
        shutil.rmtree(run / f"{stem}.discarded", ignore_errors=True)


def clear(path: Path) -> None:
    """Remove everything in the folder but its lock."""
    for left in path.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != "lock":
            left.unlink()

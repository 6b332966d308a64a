"""A stage of the kit: whether it has to run, and the folder that it writes.

    decision = stage.decide("02_data", run)    # skip, run, resume or refuse, and why
    work = stage.begin(decision)               # None: up to date. Otherwise write below work.path ...
    work.finish()                              # ... and RUN/02_data.partial becomes RUN/02_data

A stage is finished if and only if RUN/STEM/stage.json is there: it is written last inside RUN/STEM.partial,
and one rename puts the folder in place. So a stage may be killed at any moment, and the next start knows what
to do: it skips, runs, resumes or refuses.
The parts: ledger.py and code.py compare, decision.py decides, folder.py moves and locks, program.py is the
command line.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

from lib.run import folder, ledger, terminal
from lib.run.decision import Decision, check_upstream, decide
from lib.run.errors import StageError
from lib.run.folder import newest_checkpoint
from lib.run.ledger import ROOT, STAGES, UPSTREAM
from lib.run.program import arguments, asked_to_stop, command, remember_latest, resolve_run, run_script

__all__ = ["ROOT", "STAGES", "UPSTREAM", "Decision", "Knobs", "Work"]
__all__ += ["arguments", "asked_to_stop", "begin", "command", "decide", "every_knob", "newest_checkpoint"]
__all__ += ["remember_latest", "resolve_run", "run_script", "view"]


class Knobs(SimpleNamespace):
    """The knobs that a stage declared, as attributes; `vars(knobs)` is all of them."""

    def __getattr__(self, knob: str):
        fix = "add its number to those that read the knob, the second argument of its line in 01_config.py"
        raise AttributeError(f"{knob} is not declared for this stage: {fix}")

    def __setattr__(self, knob: str, value) -> None:
        raise AttributeError(f"{knob} is read-only: a run does what its config.json says")


class Work:
    """A started stage, which writes below `path`: RUN/STEM.partial, and RUN/STEM after `finish`."""

    def __init__(self, decision: Decision, leader: bool):
        self.run, self.stem, self.leader = decision.run, decision.stem, leader
        self.path = folder.partial(self.run, self.stem)
        self.config = Knobs(**({} if self.stem == "01_config" else ledger.knobs(self.run, self.stem)[0]))
        self.checkpoint = decision.checkpoint  # the one to resume from, if any
        self._began_seconds = time.monotonic()
        self._outside = {}
        self._started = {"stage": self.stem, "reads": decision.reads, "forced": decision.forced}
        self._started["resumed_over"] = decision.resumed_over

    def input(self, stem: str) -> Path:
        """The finished folder of an earlier stage."""
        if stem not in UPSTREAM[self.stem]:
            raise KeyError(f"{self.stem} reads {stem}, which UPSTREAM in lib/run/ledger.py doesn't say")
        return self.run / stem

    def uses(self, path: Path | str, sha256: str | None = None) -> None:
        """Record a file, or all of a folder, as an input of the stage; call it before reading.

        sha256: given by a caller that has hashed the bytes already.
        """
        if self.leader:
            self._outside |= ledger.outside(Path(path), sha256)

    def finish(self, volatile: tuple[str, ...] = ()) -> None:
        """Finish the stage: write stage.json and put the folder in place; only the leader does.

        volatile: files, folders and globs that are no part of the stage's result.
        """
        if not self.leader:
            return
        seconds = round(time.monotonic() - self._began_seconds, 3)
        reads = self._started["reads"] | {"outside": self._outside}
        wrote = ledger.outputs(self.path, volatile)
        content = self._started | {"reads": reads, "wrote": wrote, "seconds": seconds}
        folder.sync_tree(self.path)  # what stage.json vouches for has to be on the disk before it
        ledger.write_json(self.path / "stage.json", content)
        folder.put_in_place(self.run, self.stem)
        folder.unlock(self.path)
        self.path = self.run / self.stem
        terminal.say(f"{self.stem} finished in {terminal.duration(seconds)}: {self.path}", "green")
        _say_next(self.stem, self.run)

    def _open(self) -> None:
        """Lock the folder, clear it of all but what is resumed from, and write what this start read."""
        self.path.mkdir(parents=True, exist_ok=True)
        folder.lock(self.path)
        if self.checkpoint:
            before = ledger.read_json(self.path / "started.json")
            self._started["forced"] = before["forced"]  # the finished training that it replaces is kept still
            self._started["resumed_over"] = before["resumed_over"] + self._started["resumed_over"]
        elif self._started["forced"] and folder.checkpoints(self.path):
            folder.set_aside(self.path, self.run / f"{self.stem}.old")
            self.path.mkdir()
            folder.lock(self.path)
        else:
            folder.clear(self.path)
        ledger.write_json(self.path / "started.json", self._started)


def begin(decision: Decision, leader: bool = True) -> Work | None:
    """The work to do, or None: the stage is up to date. Only the leader prints, makes folders and finishes.

    The other ranks wait for the leader before they touch `work.path`, which may not be there yet.
    """
    if decision.action == "refuse":
        if leader:
            raise StageError(decision.what, decision.fix)
        sys.exit(1)  # the leader says why
    if not leader:
        return None if decision.action == "skip" else Work(decision, leader)
    for warning in decision.warnings:
        terminal.warn(warning)
    if decision.action == "skip":
        terminal.say(f"{decision.stem} is up to date: {decision.run / decision.stem}", "green")
        _say_next(decision.stem, decision.run)
        return None
    work = Work(decision, leader)
    work._open()
    if work.checkpoint:
        terminal.say(f"{work.stem} goes on from {work.checkpoint}")
    if decision.what:
        terminal.say(f"{work.stem} {'goes on although' if work.checkpoint else 'runs'}: {decision.what}")
    return work


def view(stem: str, run: Path, own: bool = False) -> Work:
    """A Work that only looks: it writes and locks nothing, and its `path` is RUN/STEM.

    By default it needs the earlier stages to be up to date; with `own`, only the stage itself to be finished.
    """
    run = Path(run)
    if own and not ledger.finished(run / stem):
        fix = f"run first: {command(stem, run)}"
        raise StageError(f"{run / stem} is not there: {stem} has not finished", fix)
    for warning in [] if own else check_upstream(run, stem):
        terminal.warn(warning)
    work = Work(Decision(stem, run, "view"), leader=False)
    work.path = run / stem
    return work


def every_knob(run: Path) -> Knobs:
    """All knobs of a run that 01 has finished, whoever reads them; a stage's own are its Work's `config`."""
    return Knobs(**ledger.read_json(view("01_config", run, own=True).path / "config.json"))


def _say_next(stem: str, run: Path) -> None:
    """Print the command of the next stage."""
    for later in STAGES[STAGES.index(stem) + 1 :][:1]:
        terminal.next_command(command(later, run))

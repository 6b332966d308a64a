"""A stage of the kit: whether it has to run, and the folder that it writes.

    decision = stage.decide("02_data", run)    # skip, run, resume or refuse, and why
    work = stage.begin(decision)               # None: up to date. Otherwise write below work.path ...
    work.finish()                              # ... and RUN/02_data.partial becomes RUN/02_data

A stage is finished if and only if RUN/STEM/stage.json is there: it is written last inside RUN/STEM.partial,
and one rename puts the folder in place. So a stage may be killed at any moment, and the next start knows what
to do: it skips, runs, resumes or refuses.
The parts: lib/ledger.py compares, lib/folder.py moves and locks, lib/program.py is the command line.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

from lib import folder, ledger, terminal
from lib.folder import newest_checkpoint
from lib.ledger import ROOT, STAGES, UPSTREAM, StageError
from lib.program import arguments, asked_to_stop, command, remember_latest, resolve_run, run_script

__all__ = ["ROOT", "STAGES", "UPSTREAM", "Decision", "Knobs", "StageError", "Work"]
__all__ += ["arguments", "asked_to_stop", "begin", "command", "decide", "newest_checkpoint"]
__all__ += ["remember_latest", "resolve_run", "run_script", "view"]


@dataclass
class Decision:
    """What a start should do: `action` is skip, run, resume or refuse; `what` is why, `fix` what mends it."""

    stem: str
    run: Path
    action: str
    what: str = ""
    fix: str = ""
    warnings: list[str] = field(default_factory=list)
    reads: dict = field(default_factory=dict)
    forced: bool = False
    resumed_over: list[str] = field(default_factory=list)  # the changes that --resume disregards
    checkpoint: Path | None = None  # the one to go on from: every rank takes the same

    def __post_init__(self):
        """What rank 0 decided reaches the others as JSON, in which a path is a text."""
        self.run, self.checkpoint = Path(self.run), self.checkpoint and Path(self.checkpoint)


def decide(stem: str, run: Path, force=False, resume=False, knobs: dict | None = None) -> Decision:
    """The decision on starting a stage now. One rank takes it, as it may put a finished folder in place.

    `knobs` is for 01_config, which reads no config.json: {"recipe": path, "overrides": ["knob=value", ...]}.
    """
    run, path = Path(run), folder.partial(Path(run), stem)
    try:
        folder.heal(run, stem)
        warnings = _check_upstream(run, stem)
        reads = _reads(run, stem, knobs)
        checkpoint = newest_checkpoint(path)
        if force and not (checkpoint and _torchrun_restarts(path)):
            action, why = "run", ["--force"]
        else:
            action, why = _choose(run, stem, reads, resume, checkpoint)
    except StageError as refusal:
        return Decision(stem, run, "refuse", refusal.what, refusal.fix)
    decision = Decision(stem, run, action, _count(why), "", warnings, reads, force)
    if action == "resume":
        decision.resumed_over, decision.checkpoint = why, checkpoint
        for damaged in itertools.takewhile(lambda found: found != checkpoint, folder.checkpoints(path)):
            warnings.append(f"{damaged} is passed over, since it is damaged: {folder.damage(damaged)}")
    return decision


def _reads(run: Path, stem: str, knobs: dict | None) -> dict:
    """What a start of the stage would read now; `knobs` are what 01_config was given."""
    mine = {} if stem == "01_config" else ledger.knobs(run, stem)[1]
    return {
        "knobs": knobs if stem == "01_config" else mine,
        "upstream": {earlier: ledger.digest(run / earlier) for earlier in UPSTREAM[stem]},
        "source": ledger.source(stem, mine),
    }


def _torchrun_restarts(path: Path) -> bool:
    """Whether torchrun starts again what has obeyed its --force: --max-restarts repeats all words."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return restarted and ledger.read_json(path / "started.json")["forced"]


def _choose(run: Path, stem: str, reads: dict, resume: bool, checkpoint: Path | None) -> tuple[str, list]:
    """The action and the changes behind it; a refusal is a StageError. Only 05_train has checkpoints."""
    path, final, again = folder.partial(run, stem), run / stem, command(stem, run)
    since_start = []
    if checkpoint:
        began = ledger.read_json(path / "started.json")
        since_start = ledger.changes(began["reads"], reads)
        if resume or not since_start:
            return "resume", since_start
    if ledger.finished(final):
        _check_outputs(final, again)
        then = ledger.read_json(final / "stage.json")["reads"]
        since = ledger.changes(then, reads) + ledger.outside_changes(then["outside"])
        if since and stem == "05_train":
            as_is = command("06_save", run) if then["upstream"] == reads["upstream"] else "undo that"
            raise StageError(
                f"{final} is a finished training, and since then {_count(since)}",
                f"to keep it: {as_is}; to train again and keep it as {stem}.old: {again} --force",
            )
        return ("run", since) if since else ("skip", [])
    if checkpoint:
        raise StageError(
            f"{checkpoint} is there to go on from, but since its training began {_count(since_start)}",
            f"to go on all the same: {again} --resume; to start over and keep {stem}.old: {again} --force",
        )
    if damaged := folder.checkpoints(path):
        raise StageError(
            f"every checkpoint is damaged, such as {damaged[0]}: {folder.damage(damaged[0])}",
            f"to start over and keep {stem}.old: {again} --force",
        )
    return "run", []


def _check_upstream(run: Path, stem: str) -> list[str]:
    """Warnings about edited sources; StageError at the first earlier stage that is missing or out of date."""
    warnings = []
    for earlier in _all_upstream(stem):
        final, again = run / earlier, command(earlier, run)
        if not ledger.finished(final):
            kept = newest_checkpoint(folder.partial(run, earlier))
            first = f"go on from its {kept.name} first" if kept else "run first"
            raise StageError(f"{final} is not there: {earlier} has not finished", f"{first}: {again}")
        _check_outputs(final, again)
        then = ledger.read_json(final / "stage.json")["reads"]
        now = _reads(run, earlier, then["knobs"])
        since = ledger.changes(then, now | {"source": then["source"]})
        since += ledger.outside_changes(then["outside"])
        if earlier == "05_train" and now["upstream"] == then["upstream"]:
            # A training is worth more than a knob that was edited after it: 06 saves what was trained.
            warnings += [f"{final} is kept as it was trained, but {change}" for change in since]
        elif since:
            raise StageError(f"{final} is out of date: {_count(since)}", f"run first: {again}")
        if edited := ledger.edited_sources(then["source"], now["source"]):
            warnings.append(f"edited since {earlier} ran: {', '.join(edited)}; to run it again: {again}")
    return warnings


def _check_outputs(final: Path, again: str) -> None:
    """StageError where a finished folder is not as its stage wrote it."""
    if edited := ledger.edited_outputs(final):
        fix = f"to write it again and keep this folder as {final.name}.old: {again} --force"
        raise StageError(_count(edited), fix)


def _all_upstream(stem: str) -> list[str]:
    """Every earlier stage that this one rests on, the first one first."""
    found = {each for direct in UPSTREAM[stem] for each in (direct, *_all_upstream(direct))}
    return sorted((found | {"01_config"}) - {stem})


def _count(lines: list[str]) -> str:
    """The first line, and how many more there are."""
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"{lines[0]}{more}" if lines else ""


class Knobs(SimpleNamespace):
    """The knobs that a stage declared, as attributes; `vars(knobs)` is all of them."""

    def __getattr__(self, knob: str):
        fix = "add the stage to that knob's stages=(...) in 01_config.py"
        raise AttributeError(f"{knob} is not declared for this stage: {fix}")

    def __setattr__(self, knob: str, value) -> None:
        raise AttributeError(f"{knob} is read-only: a run does what its config.json says")


class Work:
    """A started stage, which writes below `path`: RUN/STEM.partial, and RUN/STEM after `finish`."""

    def __init__(self, decision: Decision, leader: bool):
        self.run, self.stem, self.leader = decision.run, decision.stem, leader
        self.path = folder.partial(self.run, self.stem)
        self.config = Knobs(**({} if self.stem == "01_config" else ledger.knobs(self.run, self.stem)[0]))
        self.checkpoint = decision.checkpoint  # to go on from
        self._began_seconds = time.monotonic()
        self._outside = {}
        self._started = {"stage": self.stem, "reads": decision.reads, "forced": decision.forced}
        self._started["resumed_over"] = decision.resumed_over

    def input(self, stem: str) -> Path:
        """The finished folder of an earlier stage."""
        if stem not in UPSTREAM[self.stem]:
            raise KeyError(f"{self.stem} reads {stem}, which UPSTREAM in lib/ledger.py doesn't say")
        return self.run / stem

    def uses(self, path: Path | str, sha256: str | None = None) -> None:
        """From now on this file, or all of this folder, is an input: to be said before it is read.

        Whoever has hashed the bytes that he reads hands the sha256 in, and saves the hashing.
        """
        if self.leader:
            self._outside |= ledger.outside(Path(path), sha256)

    def finish(self, volatile: tuple[str, ...] = ()) -> None:
        """The stage is finished. `volatile` names files, folders and globs that are no part of its result."""
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
        """The folder is locked, holds only what is gone on with, and says what this start read."""
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

    A view of what a start would do needs up-to-date earlier stages; one of what it wrote (`own`) only that.
    """
    run = Path(run)
    if own and not ledger.finished(run / stem):
        fix = f"run first: {command(stem, run)}"
        raise StageError(f"{run / stem} is not there: {stem} has not finished", fix)
    for warning in [] if own else _check_upstream(run, stem):
        terminal.warn(warning)
    work = Work(Decision(stem, run, "view"), leader=False)
    work.path = run / stem
    return work


def _say_next(stem: str, run: Path) -> None:
    """Names the command of the stage that follows."""
    for later in STAGES[STAGES.index(stem) + 1 :][:1]:
        terminal.next_command(command(later, run))

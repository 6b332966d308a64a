"""Whether a stage has to run: it skips, runs, resumes, or refuses with the command that mends it."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from lib.run import code, folder, ledger
from lib.run.errors import StageError
from lib.run.ledger import UPSTREAM
from lib.run.program import command


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


def decide(stem: str, run: Path, force=False, resume=False, knobs: dict | None = None) -> Decision:
    """The decision on starting a stage now. Only one rank takes it, as it may put a finished folder in place.

    `knobs` is for 01_config, which reads no config.json: {"recipe": path, "overrides": ["knob=value", ...]}.
    """
    run, path = Path(run), folder.partial(Path(run), stem)
    try:
        folder.heal(run, stem)
        warnings = check_upstream(run, stem)
        reads = _reads(run, stem, knobs)
        checkpoint = folder.newest_checkpoint(path)
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
        "source": code.source(stem, mine),
    }


def _torchrun_restarts(path: Path) -> bool:
    """Whether torchrun restarts a run that has already obeyed --force: it repeats the whole command."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return restarted and ledger.read_json(path / "started.json")["forced"]


def _choose(run: Path, stem: str, reads: dict, resume: bool, checkpoint: Path | None) -> tuple[str, list]:
    """(the action, the changes behind it); StageError is a refusal. Only 05_train has checkpoints."""
    path, final, again = folder.partial(run, stem), run / stem, command(stem, run)
    since_start = []
    if checkpoint:
        began = ledger.read_json(path / "started.json")
        since_start = ledger.changes(began["reads"], reads)
        if resume or not since_start:
            return "resume", since_start
    if ledger.finished(final):
        _refuse_edited_outputs(final, again)
        then = ledger.read_json(final / "stage.json")["reads"]
        since = ledger.changes(then, reads) + ledger.outside_changes(then["outside"])
        if since and stem == "05_train":
            as_is = command("06_save", run) if then["upstream"] == reads["upstream"] else "undo that"
            raise StageError(
                f"{final} is a finished training, and since then {_count(since)}",
                f"to keep it: {as_is}; to train again and keep it as {stem}.old: {again} --force; "
                f"to train its adapter further: another run with lora_model_dir: {final / 'adapter'}",
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


def check_upstream(run: Path, stem: str) -> list[str]:
    """Warnings about edited sources; StageError where an earlier stage is missing or out of date."""
    warnings = []
    for earlier in _all_upstream(stem):
        final, again = run / earlier, command(earlier, run)
        if not ledger.finished(final):
            kept = folder.newest_checkpoint(folder.partial(run, earlier))
            first = f"go on from its {kept.name} first" if kept else "run first"
            raise StageError(f"{final} is not there: {earlier} has not finished", f"{first}: {again}")
        _refuse_edited_outputs(final, again)
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


def _refuse_edited_outputs(final: Path, again: str) -> None:
    """Raise StageError where a finished folder is not as its stage wrote it."""
    if edited := ledger.edited_outputs(final):
        fix = f"to write it again and keep this folder as {final.name}.old: {again} --force"
        raise StageError(_count(edited), fix)


def _all_upstream(stem: str) -> list[str]:
    """Every earlier stage that this one builds on, directly or through others, in order."""
    found = {each for direct in UPSTREAM[stem] for each in (direct, *_all_upstream(direct))}
    return sorted((found | {"01_config"}) - {stem})


def _count(lines: list[str]) -> str:
    """The first line, with the number of the others."""
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"{lines[0]}{more}" if lines else ""

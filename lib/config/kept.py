"""kept: what a run keeps from 01's first start on: the day in its templates, the commit of its model."""
from datetime import date
from pathlib import Path

from lib import registry
from lib.models import origin
from lib.run.errors import StageError
from lib.run.ledger import read_json


def first_day(run: Path) -> str:
    """The day that a run's templates write: that of 01's first run, so that samples stay the same."""
    try:
        return read_json(run / "01_config" / "config.json")["template_date"]
    except (StageError, KeyError):                               # there is none, or an older kit's
        return date.today().isoformat()


def commit_kept(run: Path, base_model: str, revision: str | None) -> dict | None:
    """{base_model, revision as the recipe has it, commit}; None for a folder, or where no commit is known.

    When 01 runs again, the commit is kept: `main` may mean another one by then, and a run has one model.
    """
    if Path(base_model).is_dir():
        return None
    asked = {"base_model": base_model, "revision": revision or "main"}
    try:
        kept = read_json(run / "01_config" / "origin.json")
        if asked.items() <= kept.items():
            return kept
    except StageError:                                           # there is none
        pass
    registry.refuse_unloadable(base_model)
    found = origin.commit(base_model, revision)
    return asked | {"commit": found} if found else None

"""trackers: the figures of metrics.jsonl and timings.jsonl, sent on to TensorBoard or Weights & Biases.

Only figures, and the recipe's knobs, are sent: no row of the data, no picture and no weight.

Fork me to: send them elsewhere (a function in `trackers_of` that takes a step and its figures).
"""
import importlib.util
from collections.abc import Callable
from pathlib import Path

from lib.run.errors import StageError
from lib.run.ledger import read_json

Tracker = Callable[[int, dict[str, float]], None]


def trackers_of(knobs, run: Path) -> list[Tracker]:
    """The functions that send each step's figures to the recipe's trackers; StageError lacking a package."""
    found: list[Tracker] = []
    if knobs.use_tensorboard:
        refuse_missing("tensorboard", "use_tensorboard")
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, figures: dict[str, float]) -> None:
            for name, figure in figures.items():
                writer.add_scalar(name, figure, step)
            writer.flush()
        found.append(to_tensorboard)
    if knobs.wandb_project:
        refuse_missing("wandb", "wandb_project")
        import wandb
        session = wandb.init(project=knobs.wandb_project, entity=knobs.wandb_entity, dir=str(run),
                             name=knobs.wandb_name or run.name,
                             config=read_json(run / "01_config" / "config.json"))
        found.append(lambda step, figures: session.log(figures, step=step))
    return found


def refuse_missing(module: str, knob: str) -> None:
    """Raise StageError where a tracker's package is missing."""
    if importlib.util.find_spec(module) is None:
        raise StageError(f"{knob}: the Python package {module} is not installed", f"pip install {module}")


def numbers(row: dict) -> dict[str, float]:
    """A row's figures, without its step."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}

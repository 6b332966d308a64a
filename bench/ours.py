"""ours: this kit's side of the bench, which is 05_train's own `load` and `optimizer_step` on a run folder.

    python -m bench.ours RUN OUT.json [STEPS]

A step's time goes from its first forward to the end of its update, without the wait for encoded batches: the
other side is handed its batches as files, and its reading of them is left out, too. Keeping the features of
all pictures is time: "before_seconds", which counts with the epochs' steps.
"""
import gc
import json
import shutil
import sys
from pathlib import Path

from bench.machine import Meter, now
from bench.prepare import loaded
from lib import fast, features


def main(run_path: str, out: str, steps: str | None = None) -> None:
    """Train so many steps, all by default, and write what they took."""
    shutil.rmtree(Path(run_path) / "features", ignore_errors=True)     # what an earlier round kept
    train, run = loaded(Path(run_path))
    wanted, began = min(int(steps or run.total_steps), run.total_steps), now(run.world.device)
    if run.work.config.cache_vision_features:
        train.keep_features(run)
    before_seconds = now(run.world.device) - began
    with fast.paths(run.model, run.roles), features.replayed(run.model):
        meter = take(train, run, wanted, train.micro_batches(run))
    result = meter.result() | {"before_seconds": before_seconds}
    Path(out).write_text(json.dumps(result) + "\n", encoding="utf-8")


def take(train, run, steps: int, batches) -> Meter:
    """What so many steps took."""
    meter, rate = Meter(run.world.device), run.work.config.learning_rate
    gc.collect()
    gc.freeze()                           # as 05_train does
    for step in range(steps):
        began = now(run.world.device)
        figures = train.optimizer_step(run, step, run.order.of_step(step), batches, rate)
        seconds = now(run.world.device) - began
        meter.step(seconds=seconds - figures["waited"], waited=figures["waited"], loss=figures["loss"],
                   grad_norm=figures["grad_norm"], tokens=figures["supervised_tokens"])
    return meter


if __name__ == "__main__":
    main(*sys.argv[1:])

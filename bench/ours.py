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
import time
from collections.abc import Callable
from pathlib import Path

from bench.machine import Meter, now
from bench.prepare import loaded
from lib import fast
from lib.fast import features, products
from lib.training import optim, parallel
from lib.training.steps import figures_of


def nothing(run, step: int) -> None:
    """Do nothing between steps."""


def main(run_path: str, out: str, steps: str | None = None) -> None:
    """Train so many steps, all by default, and write what they took on the first rank."""
    with parallel.world() as world:
        result = trained(Path(run_path), int(steps) if steps else None, world=world)
    if world.is_leader:
        Path(out).write_text(json.dumps(result) + "\n", encoding="utf-8")


def trained(run_path: Path, steps: int | None = None, after: Callable = nothing, world=None) -> dict:
    """What training took.

    after: called after each step, outside of all times, with the run and the number of steps so far.
    """
    shutil.rmtree(run_path / "features", ignore_errors=True)           # what an earlier round kept
    train, run = loaded(run_path, world)
    began, cpu = now(run.world.device), time.process_time()
    with products.paths(run.dtype, run.world.device):
        if run.work.config.cache_vision_features:
            train.keep_features(run)
        seconds, cpu_seconds = now(run.world.device) - began, time.process_time() - cpu
        steps = min(steps or run.total_steps, run.total_steps)
        with fast.paths(run.model, run.roles), features.replayed(run.model):
            meter = take(train, run, steps, train.micro_batches(run), after)
    return meter.result() | {"before_seconds": seconds, "before_cpu_seconds": cpu_seconds}


def take(train, run, steps: int, batches, after: Callable = nothing) -> Meter:
    """What so many steps took."""
    meter, config = Meter(run.world.device), run.work.config
    gc.collect()
    gc.freeze()                           # as 05_train does
    for step in range(steps):
        began, cpu = now(run.world.device), time.process_time()
        rate = optim.learning_rate(config, step, run.total_steps)
        taken = train.optimizer_step(run, step, run.order.of_step(step), batches, rate)
        figures = figures_of(run, taken)
        seconds, cpu_seconds = now(run.world.device) - began, time.process_time() - cpu
        meter.step(seconds=seconds - figures["waited"], cpu_seconds=cpu_seconds, waited=figures["waited"],
                   loss=figures["loss"], grad_norm=figures["grad_norm"], tokens=figures["supervised_tokens"])
        after(run, step + 1)
    return meter


if __name__ == "__main__":
    main(*sys.argv[1:])

"""rehearsal: 05's view --check, which takes the loop's own steps but writes nothing.

First the longest step that the run can meet: does it fit, and how long would all of them take? Then 30 steps
on one batch, which is learnt by heart if labels, gradients and optimizer work together.
"""
from collections.abc import Callable, Iterator

from lib import optim, parallel, terminal
from lib.sampler import loader

RATE = {"adapter": 2e-3, "model": 1e-4}   # at least, so that 30 steps suffice where the recipe is cautious
STEPS, ENOUGH = 30, 0.1                   # loss per token


def check(run, optimizer_step: Callable[..., dict]) -> None:
    """Nothing; says what a step costs and that one batch is learnt, or stops and says what is wrong."""
    config, samples, world = run.work.config, run.samples, run.world
    by_length = sorted(range(len(samples)), key=lambda index: -samples.input_tokens[index])
    longest = by_length[:run.order.global_batch_size]
    rate = optim.learning_rate(config, 0, run.total_steps)
    figures = optimizer_step(run, 0, longest, batches(run, longest), rate)
    tokens, seconds = sum(samples.input_tokens[index] for index in longest), figures["seconds"]
    peak_gib, at_most = parallel.peak_memory_gib(world.device), terminal.duration(seconds * run.total_steps)
    terminal.say(f"the longest step: {tokens:,} tokens in {terminal.duration(seconds)}, peak memory "
                 f"{peak_gib:.2f} GiB; the run's {run.total_steps:,} steps take at most {at_most}")
    few = run.order.of_step(0)[:config.micro_batch_size * world.world_size]
    rate = max(config.learning_rate, RATE["adapter" if config.adapter else "model"])
    losses = []
    with terminal.Progress("one batch", STEPS) as progress:
        for step in range(1, STEPS + 1):
            losses.append(optimizer_step(run, step, few, batches(run, few), rate)["loss"])
            progress.update(step, loss=f"{losses[-1]:.4f}")
    said = f"{STEPS} steps on one batch, at a rate of {rate:g}: loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    if losses[-1] >= ENOUGH:
        why = reason(samples, few, losses)
        world.stop(f"the model doesn't overfit one batch: {why} ({said}, not < {ENOUGH})",
                   "look at what trains, in 02_data/preview.html and in 04_lora.py's table")
    terminal.say(f"{said}: labels, gradients and optimizer work together", "green")
    if config.learning_rate < rate / 1000:
        terminal.warn(f"learning_rate {config.learning_rate:g} is far below that: the run may learn nothing")


def batches(run, indices: list[int]) -> Iterator[dict]:
    """This rank's micro-batches of these samples."""
    mine = run.samples.dealt(indices, run.work.config.micro_batch_size, run.world.rank, run.world.world_size)
    return iter(loader(run.samples, mine, 0, run.world.device))


def reason(samples, indices: list[int], losses: list[float]) -> str:
    """Why a batch wasn't learnt, as far as it shows."""
    answers: dict[tuple, int] = {}
    for index in indices:
        record = samples.records[index]
        asked = record["text"][:record["spans"][-1]["start"]], *(m["sha256"] for m in record["media"])
        other = answers.setdefault(asked, index)
        if samples.records[other]["text"] != record["text"]:
            return f"{samples.ids[other]} and {samples.ids[index]} answer the same question differently"
    if losses[-1] > 0.9 * losses[0]:
        return "it hardly falls: what trains hardly reaches the answer"
    return "it falls, but not far enough: raise lora_r or learning_rate, or name more roles"

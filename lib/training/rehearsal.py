"""rehearsal: 05's view --check, which takes the loop's own steps but writes nothing.

First the model's own answer: what `generate` writes token by token, the training forward has to predict from
the same text at once. Then the longest step that the run can meet: does it fit, and how long would all steps
take? Then up to 100 steps on one batch, which is learnt by heart if labels, gradients and optimizer work
together.
"""
import heapq
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from lib.batches.order import Row, in_turn
from lib.batches.sampler import loader, to_device
from lib.collator import collate, is_per_token
from lib.run import terminal
from lib.training import devices, optim
from lib.training.loss import supervised_states
from lib.training.steps import Step, figures_of

RATE = {"adapter": 2e-3, "model": 1e-4}   # learning rates at least, so that STEPS suffice for any recipe
STEPS, ENOUGH = 100, 0.1                  # steps on one batch at most; a loss per token at which it is learnt
ANSWER, CLEAR, ENOUGH_TOKENS = 16, 0.02, 0.9   # tokens; lead that rounding can't undo; share to be predicted


def check(run, optimizer_step: Callable[..., Step]) -> None:
    """Say what a step costs and that one batch is learnt, or stop and say what is wrong."""
    own_answer(run)
    longest_step(run, optimizer_step)
    one_batch(run, optimizer_step)


def longest_step(run, optimizer_step: Callable[..., Step]) -> None:
    """Take the longest step that the run can meet; say what it costs, and how long all steps take at most."""
    samples = run.samples
    tokens_of = {row: sum(samples.input_tokens[index] for index in row)
                 for row in in_turn(samples, run.order.room)}
    longest = sorted(tokens_of, key=tokens_of.get, reverse=True)[:run.order.global_batch_size]
    rate = optim.learning_rate(run.work.config, 0, run.total_steps)
    figures = figures_of(run, optimizer_step(run, 0, longest, batches(run, longest), rate))
    tokens, seconds = sum(tokens_of[row] for row in longest), figures["seconds"]
    peak_gib = devices.peak_memory_gib(run.world.device)
    at_most = terminal.duration(seconds * run.total_steps)
    terminal.say(f"the longest step: {tokens:,} tokens in {terminal.duration(seconds)}, peak memory "
                 f"{peak_gib:.2f} GiB; the run's {run.total_steps:,} steps take at most {at_most}")


def one_batch(run, optimizer_step: Callable[..., Step]) -> None:
    """Learn one batch by heart; stop the run, with the likeliest reason, where that fails."""
    config, world = run.work.config, run.world
    few = run.order.of_step(0)[:config.micro_batch_size * world.world_size]
    rate = max(config.learning_rate, RATE["adapter" if config.adapter else "model"])
    losses = []
    with terminal.Progress("one batch", STEPS) as progress:
        for step in range(1, STEPS + 1):
            taken = optimizer_step(run, step, few, batches(run, few), rate)
            losses.append(figures_of(run, taken)["loss"])
            progress.update(step, loss=f"{losses[-1]:.4f}")
            if losses[-1] < ENOUGH:
                break
    result = (f"{terminal.counted(len(losses), 'step')} on one batch, at a rate of {rate:g}: "
              f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if losses[-1] >= ENOUGH:
        why = reason(run.samples, few, losses)
        world.stop(f"the model doesn't overfit one batch: {why} ({result}, not < {ENOUGH})",
                   "look at what trains, in 02_data/preview.html and in 04_lora.py's table")
    terminal.say(f"{result}: labels, gradients and optimizer work together", "green")
    if config.learning_rate < rate / 1000:
        terminal.warn(f"learning_rate {config.learning_rate:g} is far below that: the run may learn nothing")


@torch.no_grad()
def own_answer(run) -> None:
    """Stop the run where the model, reading its own answer in a padded batch, would predict other tokens.

    This needs no labels, and shows wrong positions, token types, placeholders and padding.
    """
    samples, record, device = run.samples, run.samples.records[0], run.world.device
    encoder = samples.encoder.bounded(record["image_bounds"])
    text, media, _ = encoder.prompt(record)
    row = encoder.encode(text, [], media)
    asked = to_device({key: value for key, value in row.items() if key != "labels"}, device)
    media_ids = [*encoder.never_trained]   # an untrained model may say them, too
    run.model.eval()
    with run.autocast():
        output = run.model.generate(**asked, do_sample=False, max_new_tokens=ANSWER,
                                    suppress_tokens=media_ids or None, pad_token_id=encoder.pad_id)
    answer = output[0, asked["input_ids"].shape[1]:].tolist()
    row = followed_by(row, answer)
    longer = samples.encoded(max(range(len(samples)), key=samples.input_tokens.__getitem__))
    batch = collate([row] if encoder.batch != "any" else [row, longer], encoder.pad_id, encoder.collate)
    batch.pop("labels")
    with run.autocast():
        logits = run.model(**to_device(batch, device), use_cache=False).logits
    end = row["input_ids"].shape[1]
    logits = logits[0, end - len(answer) - 1:end - 1].float()                    # [ANSWER, V]
    logits[:, media_ids] = -torch.inf
    largest, second = logits.topk(2).values.unbind(-1)
    clear = (largest - second > CLEAR * largest.abs()).tolist()                  # else rounding may decide
    same = [a == b for a, b in zip(logits.argmax(-1).tolist(), answer)]
    judged = [agrees for agrees, counts in zip(same, clear) if counts]
    result = f"of its own answer, {sum(same)} of {len(answer)} tokens are predicted again from the text"
    if sum(judged) < ENOUGH_TOKENS * len(judged):
        run.world.stop(f"{result}: training reads it otherwise than inference", "choose another base_model")
    terminal.say(result)
    run.model.train()


def followed_by(row: dict[str, torch.Tensor], answer: list[int]) -> dict[str, torch.Tensor]:
    """An encoded prompt with an answer's ids behind it, which are text and all attended to."""
    ids = torch.tensor([answer])                                                 # [1, ANSWER]
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}            # token types: 0, text
    return row | {key: torch.cat([row[key], more.get(key, torch.zeros_like(ids))], dim=1)
                  for key in row if is_per_token(key)}


def prove_rows_apart(run) -> None:
    """Stop the run where samples that share a row or a batch change one another on the loaded model.

    Batches are only looked at in a family without a record: those with one are covered by tests.
    """
    config, samples = run.work.config, run.samples
    if config.sample_packing:
        order = run.order
        rows = [row for step in range(order.steps_per_epoch) for row in order.of_step(step)]
        full = sum(samples.input_tokens) / (len(rows) * order.room)
        terminal.say(f"packed: {len(samples):,} samples in {len(rows):,} rows of at most {order.room:,} "
                     f"tokens, {1 - full:.1%} of which stay empty")
        if shared := [row for row in rows if len(row) > 1]:
            row = max(shared, key=lambda row: sum(samples.media_tokens[index] > 0 for index in row))
            row = tuple(sorted(row, key=lambda index: -samples.media_tokens[index])[:3])
            prove_apart(run, row, [row], "samples of a packed row see", "sample_packing: false")
    elif run.roles.guessed and config.micro_batch_size > 1:
        number = min(3, config.micro_batch_size)
        most = heapq.nlargest(number, range(len(samples)), key=samples.media_tokens.__getitem__)
        prove_apart(run, most, [(index,) for index in most], "rows of one batch change",
                    "micro_batch_size: 1")


def prove_apart(run, indices: Row, rows: list[Row], who: str, fix: str) -> None:
    """Stop the run where samples have other hidden states in these rows of a batch than alone."""
    samples, device = run.samples, run.world.device
    single = replace(samples, positions=None, masks=None)
    *alone, together = (to_device(next(iter(loader(dealt, [some], 0, device))), device)
                        for dealt, some in [*((single, [(index,)]) for index in indices), (samples, rows)])
    run.model.eval()
    with run.autocast():
        change, limit = leak(run.model, alone, together, typical=len(rows) > 1)
    run.model.train()
    if change > limit:
        run.world.stop(f"{fix.partition(':')[0]}: {who} one another: hidden states of "
                       f"{samples.ids[indices[-1]]} change by {change:.0%}", fix)


def leak(model, alone: list[dict[str, torch.Tensor]], together: dict[str, torch.Tensor],
         typical: bool = False) -> tuple[float, float]:
    """(largest relative change of a supervised hidden state when samples share a batch, limit for rounding).

    typical: take each sample's median change, not its largest, since rounding may change a router's choices.
    The limit is well above rounding: bfloat16's is around a hundredth, float32's a hundred-thousandth.
    """
    apart = [supervised_states(model, batch) for batch in alone]                 # [N, D] each
    one_by_one = torch.cat(apart)
    limit = 1e-3 if one_by_one.dtype == torch.float32 else 5e-2
    change = (supervised_states(model, together) - one_by_one).float().norm(dim=-1)
    change /= one_by_one.float().norm(dim=-1)
    of_samples = change.split([len(states) for states in apart])
    return float(max(each.median() if typical else each.max() for each in of_samples)), limit


def batches(run, rows: list[Row]) -> Iterator[dict]:
    """This rank's micro-batches of these rows, encoded in this process."""
    mine = run.shares(rows)[run.world.rank]
    return iter(loader(run.samples, mine, 0, run.world.device))


def reason(samples, rows: list[Row], losses: list[float]) -> str:
    """The likeliest reason why a batch wasn't learnt, in words."""
    answers: dict[tuple, int] = {}
    for index in (index for row in rows for index in row):
        record = samples.records[index]
        asked = record["text"][:record["reply"]["start"]], *(m["sha256"] for m in record["media"])
        other = answers.setdefault(asked, index)
        if samples.records[other]["text"] != record["text"]:
            return f"{samples.ids[other]} and {samples.ids[index]} answer the same question differently"
    if losses[-1] > 0.9 * losses[0]:
        return "it hardly falls: what trains hardly reaches the answer"
    return "it falls, but not far enough: raise lora_r or learning_rate, or name more roles"

"""faults: what may go wrong in a training step, said in two lines that name the samples.

A run is 05_train's Run: its `now` is (step, rows of samples) of the micro-batch that the loop is at.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

from lib.batches.order import sample_of
from lib.run.errors import StageError
from lib.run.ledger import read_json

NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
GONE = ("DataLoader worker", "Pin memory thread")
LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "NCCL", "Gloo")
BITS_OF_NF4 = 4.5                         # of a weight, its part of the scales included
NAMED = 8                                 # samples that a message names at most


def not_finite(run, step: int, shares: list, losses: list, norm: float) -> list[str]:
    """The ids of the samples behind a loss or gradient that isn't finite; [] where all are finite.

    Such a step is skipped. Once there are more of them than skip_nonfinite, this stops all ranks and names
    the samples.
    """
    bad = [index for share, of_share in zip(shares, losses)
           for batch, (loss, _) in zip(share, of_share) if not math.isfinite(loss)
           for row in batch for index in row]
    if not bad and math.isfinite(norm):
        return []
    what = f"a loss that is not finite, on {len(bad)} samples" if bad else f"gradient norm {norm}"
    every = [index for share in shares for batch in share for row in batch for index in row]
    ids = names(run, bad or every)
    run.skipped += 1
    if run.skipped > (limit := run.work.config.skip_nonfinite):
        before = f" ({limit} such steps were skipped before)" if limit else ""
        run.world.stop(f"step {step + 1}: {what}: {', '.join(ids[:NAMED])}{before}",
                       "look at these rows; else lower learning_rate, or let skip_nonfinite steps go by")
    return ids


def names(run, indices: list[int]) -> list[str]:
    """The ids of a step's samples, each once."""
    return [run.samples.ids[index] for index in dict.fromkeys(map(sample_of, indices))]


@contextmanager
def explained(run) -> Iterator[None]:
    """Inside, running out of memory, a dead DataLoader worker or a lost rank becomes a StageError.

    What is on the disk stays as it is: a checkpoint that is being written is finished first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:                   # torch.OutOfMemoryError is a RuntimeError
        if is_no_memory(error):
            raise out_of_memory(run) from None
        if any(words in str(error) for words in GONE):
            raise dead_worker(run, str(error)) from None
        if run.world.world_size > 1 and any(words in str(error) for words in LOST):
            raise lost_rank(run) from None
        raise


def is_no_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, the host's or a device's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def out_of_memory(run) -> StageError:
    """The error for memory that ran out: on which samples, how long they are, which three knobs help most."""
    step, rows = run.now
    lengths = {index: run.samples.input_tokens[index] for row in rows for index in map(sample_of, row)}
    named = ", ".join(f"{run.samples.ids[index]} ({tokens:,} tokens)" for index, tokens in
                      sorted(lengths.items(), key=lambda pair: -pair[1])[:NAMED])
    has_media = any(run.samples.media_tokens[index] for index in lengths)
    path = run.work.run / "03_load_model" / "forecast.json"
    forecast = read_json(path) if path.exists() else None
    helps = "; ".join(relief(run.work.config, max(lengths.values(), default=0), has_media, forecast))
    where = f"{run.world.device} in step {step + 1}, on {named or 'no sample yet'}"
    return StageError(f"out of memory on {where}",
                      f"in 01_config.py, what helps most: {helps}; then 05_train.py --resume")


def relief(knobs, longest_tokens: int, has_media: bool, forecast: dict | None = None) -> list[str]:
    """The three knobs that save most memory here, by 03's forecast.

    Without a forecast, those that leave the training as it is come first.
    """
    accumulated = knobs.micro_batch_size * knobs.gradient_accumulation_steps
    kept = least = language = state = 0.0
    if forecast:
        kept, least = (forecast[way]["activations_gib"] for way in ("kept", "checkpointed"))
        state = forecast["gradients_gib"] + forecast["optimizer_gib"]
        language = sum(gib for kind, gib in forecast["weights_gib"].items() if kind.startswith("language "))
    can_checkpoint = knobs.gradient_checkpointing in (False, "auto")
    activations = kept if can_checkpoint else least
    ways = (
        (can_checkpoint, "gradient_checkpointing=true", kept - least),
        (knobs.micro_batch_size > 1, f"micro_batch_size=1 gradient_accumulation_steps={accumulated}",
         activations * (1 - 1 / knobs.micro_batch_size)),
        (knobs.adapter is None, "adapter=lora", state),
        (knobs.adapter == "lora", "adapter=qlora", language * (1 - BITS_OF_NF4 / 16)),
        (has_media, "image_max_pixels, for smaller pictures", 0.0),
        (True, f"sequence_len below {longest_tokens}, without the rows that are longer", 0.0),
        (True, "fewer roles that train", 0.0),
    )
    helps = sorted((way for way in ways if way[0]), key=lambda way: -way[2])
    return [words + (f" (about {gib:.1f} GiB less)" if gib >= 0.05 else "") for _, words, gib in helps[:3]]


def dead_worker(run, said: str) -> StageError:
    """The error for a worker that died: which samples were waited for, and what to do."""
    step, rows = run.now
    named = ", ".join(names(run, [index for row in rows for index in row]))
    how = said.splitlines()[0].rstrip(" .")
    return StageError(f"{how}, at or soon after {named or 'the first sample'} in step {step + 1}",
                      "host memory is the usual cause: run again with fewer dataloader_num_workers "
                      "(with 0, this process encodes, and shows what a row does)")


def lost_rank(run) -> StageError:
    """The error for another rank's end: which rank noticed it, and when."""
    step, rows = run.now
    when = f"in step {step + 1}" if rows else "before the first step"
    return StageError(f"rank {run.world.rank} of {run.world.world_size} has lost another rank {when}",
                      "that rank says why; the same command goes on from the newest checkpoint")

"""steps: what an optimizer step found, read while the device computes the next one.

A GPU works through what the host has queued, and never idles as long as the host doesn't wait for a result.
So a step's results are copied to the host without waiting, and read once the next step is queued.
"""
import time
from dataclasses import dataclass

import torch

from lib.batches.order import Row
from lib.training import faults

LATE = {"cuda": 1}                        # steps by which results are read late; elsewhere 0


class Sent:
    """A tensor being copied to the host. Reading it waits for the copy, not for what was queued after it."""

    def __init__(self, tensor: torch.Tensor):
        self.host, self.arrived = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read(self):
        """The tensor's number, or its numbers as nested lists."""
        if self.arrived:
            self.arrived.synchronize()
        return self.host.tolist()


@dataclass(frozen=True)
class Step:
    """An optimizer step that is queued on the device, with its results on their way."""
    number: int
    shares: list[list[list[Row]]]         # each rank's micro-batches
    sizes: dict[str, int]                 # lib/training/metrics.py's
    rates: dict[str, float]
    scale: Sent                           # of the loss: not 1 in float16 only
    losses: Sent                          # [rank, micro-batch, 2]: a sum of token losses, and right tokens
    norms: dict[str, Sent]                # of gradients, before clipping
    began: float                          # on time.monotonic's clock
    waited: float                         # seconds, for batches


def figures_of(run, step: Step) -> dict:
    """A step's figures, for the log; StageError that names the samples where too many steps weren't finite.

    Its seconds count from when the step before was read, since the device runs one after the other.
    """
    losses, scale = step.losses.read(), step.scale.read()
    norms = {name: norm.read() for name, norm in step.norms.items()}
    now = time.monotonic()
    seconds, run.read_at = now - max(step.began, run.read_at), now
    overflow = run.scaler.overflowed(scale, losses, norms["grad_norm"])          # only in float16
    skipped = [] if overflow else faults.not_finite(run, step.number, step.shares, losses, norms["grad_norm"])
    norms = dict.fromkeys(norms) if overflow else norms            # infinity is no JSON
    loss, right = (sum(micro_batch[i] for share in losses for micro_batch in share) for i in (0, 1))
    tokens = step.sizes["supervised_tokens"]
    return {"loss": loss / tokens, "token_accuracy": right / tokens, **step.rates, **norms, **step.sizes,
            **run.scaler.figures(scale), "waited": step.waited, "seconds": seconds, "skipped": skipped}

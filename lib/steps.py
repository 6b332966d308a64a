"""steps: what an optimizer step found, read while the device computes the next one.

A GPU works behind the host, and never stands still as long as the host waits for no result. So a step's
results are sent on their way, and read once the step after it is under way.
"""
import time
from dataclasses import dataclass

import torch

from lib import faults
from lib.order import Row

LATE = {"cuda": 1}                        # steps; elsewhere results are there at once


class Sent:
    """A tensor on its way to the host. Reading it waits for it, not for what its device got to do since."""

    def __init__(self, tensor: torch.Tensor):
        self.host, self.arrived = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read(self):
        """Its number, or its numbers as lists."""
        if self.arrived:
            self.arrived.synchronize()
        return self.host.tolist()


@dataclass(frozen=True)
class Step:
    """An optimizer step that the device has been given."""
    number: int
    shares: list[list[list[Row]]]         # each rank's micro-batches
    sizes: dict[str, int]                 # lib/metrics.py's
    rates: dict[str, float]
    scale: Sent                           # of the loss: not 1 in float16 only
    losses: Sent                          # [rank, micro-batch, 2]: a sum of token losses, and right tokens
    norms: dict[str, Sent]                # of gradients, before clipping
    began: float                          # on time.monotonic's clock
    waited: float                         # seconds, for batches


def figures_of(run, step: Step) -> dict:
    """What a step found, for the log. A StageError that names the samples where too many were no number.

    Its seconds go on from where the step before it was read, for the device has had both one after the other.
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

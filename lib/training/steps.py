"""steps: what an optimizer step found, read while the device computes the next one.

A GPU works through what the host has queued, and never idles as long as the host doesn't wait for a result.
So a step's results are copied to the host without waiting, and read once the next step is queued.
"""
import time
from collections import deque
from dataclasses import dataclass

import torch

from lib.batches.order import Row
from lib.run import terminal
from lib.training import faults
from lib.training.metrics import Log

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


class Results:
    """What steps found, written into the log and shown, `late` steps after they were queued."""

    def __init__(self, run, log: Log, progress: terminal.Progress):
        self.run, self.log, self.progress = run, log, progress
        self.late = LATE.get(run.world.device.type, 0)
        self.steps: deque[Step] = deque()
        self.signals: deque[Sent] = deque()

    def add(self, step: Step) -> None:
        """Keep a step that was queued, and read those that are done by now."""
        self.steps.append(step)
        self._read(self.late)

    def read_all(self) -> None:
        """Read all steps, also the one that the device is at."""
        self._read(0)

    def agreed(self, signal: int) -> int:
        """The signal by which any rank was asked to stop, the same for all, as many steps late; 0: none."""
        self.signals.append(Sent(self.run.world.most(signal)))
        return self.signals.popleft().read() if len(self.signals) > self.late else 0

    def _read(self, left: int) -> None:
        while len(self.steps) > left:
            step = self.steps.popleft()
            self.log.step(step.number + 1, figures_of(self.run, step))
            is_last = self.log.steps == self.run.total_steps
            if self.log.steps % self.run.work.config.logging_steps == 0 or is_last:
                self.progress.update(self.log.steps, **self.log.line())


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

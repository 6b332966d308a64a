"""parallel: one process or many (torchrun); the only file that knows which.

The model needs no wrapper: every rank holds it, and after a step's last micro-batch the gradients are summed
over ranks, some tensors at a time. A rank whose rows had no picture, or that had no row, adds zeros.
"""
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lib.run.errors import StageError
from lib.training.devices import pick_device

BUCKET = 2**26                            # gradient elements that are summed over ranks at once: 256 MiB


@dataclass(frozen=True)
class World:
    """This process's place: rank of world_size, and the device it computes on."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes; the others follow."""
        return self.rank == 0

    def agree(self, decide: Callable[[], Any]) -> Any:
        """The result of `decide()` on rank 0, on every rank.

        Where it raises on rank 0, the others stop, too, instead of waiting for a rank that is gone.
        """
        if self.world_size == 1:
            return decide()
        result, error = None, None
        if self.is_leader:
            try:
                result = decide()
            except BaseException as raised:  # raised again below, once the others know
                error = raised
        sent = [error is not None, result]
        dist.broadcast_object_list(sent, src=0, device=self.device)
        if error is not None:
            raise error
        failed, result = sent
        if failed:
            sys.exit(1)
        return result

    def everyones(self, value: Any) -> list:
        """The list of what each rank passes in, in order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def stop(self, what: str, fix: str) -> None:
        """Stop all ranks, which have found the same mistake: rank 0 raises StageError, the others exit."""
        if self.is_leader:
            raise StageError(what, fix)
        sys.exit(1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, number: int) -> torch.Tensor:
        """The greatest of the ranks' numbers, a scalar tensor on the device; nobody waits for it yet."""
        if self.world_size == 1:
            return torch.tensor(number)
        most = torch.full((), number, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], some_lack: bool) -> None:
        """Sum .grad over ranks, in the same order on each; where only some have one, the others add zeros.

        some_lack: whether a parameter may have no gradient on any rank, as a tower's in a step of texts. Then
        it stays without, and an optimizer passes over it, as on one rank; to know of it, ranks wait for one
        another.
        """
        parameters = list(parameters) if self.world_size > 1 else []
        if parameters and some_lack:
            there = torch.tensor([int(p.grad is not None) for p in parameters], device=self.device)
            dist.all_reduce(there, dist.ReduceOp.MAX)
            parameters = [p for p, somewhere in zip(parameters, there.tolist()) if somewhere]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in buckets(parameters):
            flat = torch.cat([p.grad.flatten() for p in bucket])
            dist.all_reduce(flat)
            for p, piece in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad.copy_(piece.view_as(p))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in lists of at most BUCKET elements; a larger one has a list of its own."""
    bucket, size = [], 0
    for p in parameters:
        if bucket and size + p.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


@contextmanager
def world() -> Iterator[World]:
    """This process's World, after joining the others that torchrun started.

    After an error it doesn't leave the group: others may be waiting in a collective, and torchrun ends them.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(local_rank)
    if world_size > 1:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    yield World(rank, world_size, device)
    if world_size > 1:
        dist.destroy_process_group()

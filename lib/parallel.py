"""parallel: one process or many (torchrun), on CUDA, MPS or CPU; the only file that knows which.

For adapters no wrapper module is needed: every rank holds the model, and after the last micro-batch of a step the
gradients are summed over ranks in one flat buffer. A rank whose rows had no picture simply adds zeros.
"""
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place: rank of world_size, and the device it computes on."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """Rank 0 decides, prints and writes; the others follow."""
        return self.rank == 0

    def agree(self, decide: Callable[[], str]) -> str:
        """What `decide()` returned on rank 0, on every rank: a short text (JSON for anything with a shape).

        An exception on rank 0 stops the others too, before they wait for it in a collective.
        """
        if self.world_size == 1:
            return decide()
        text, error = "", None
        if self.is_leader:
            try:
                text = decide()
            except BaseException as raised:  # handed on below: the others must not wait for a rank that died
                error = raised
        message = json.dumps({"failed": error is not None, "text": text}).encode() if self.is_leader else b""
        size = torch.tensor([len(message)], device=self.device)
        dist.broadcast(size, src=0)
        body = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.is_leader:
            body.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(body, src=0)
        answer = json.loads(bytes(body.tolist()))
        if error is not None:
            raise error
        if answer["failed"]:
            raise SystemExit(1)
        return answer["text"]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum .grad over ranks; a parameter without one counts as zeros, on every rank in the same order."""
        if self.world_size == 1:
            return
        parameters = list(parameters)
        zero = torch.zeros_like
        flat = torch.cat([(p.grad if p.grad is not None else zero(p)).flatten().float() for p in parameters])
        dist.all_reduce(flat)
        place = 0
        for p in parameters:
            piece = flat[place:place + p.numel()].view_as(p).to(p.dtype)
            place += p.numel()
            p.grad = piece if p.grad is None else p.grad.copy_(piece)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def start() -> World:
    """Join the other processes that torchrun started, or be alone."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, local_rank, world_size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(local_rank: int = 0) -> torch.device:
    """cuda:local_rank, mps or cpu: the one place where the device is chosen."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's own count, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

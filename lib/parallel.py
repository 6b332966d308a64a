"""parallel: one process or many (torchrun), on CUDA, MPS or CPU; the only file that knows which.

No wrapper module is needed: every rank holds the model, and after a step's last micro-batch the gradients are
summed over ranks, some tensors at a time. A rank whose rows had no picture, or that had no row, adds zeros.
"""
import ctypes
import functools
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lib.stage import StageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3   # of malloc.h
BUCKET = 2**26                            # gradient elements that are summed over ranks at once: 256 MiB


@dataclass(frozen=True)
class World:
    """This process's place: rank of world_size, and the device it computes on."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """Rank 0 decides, prints and writes; the others follow."""
        return self.rank == 0

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` returned on rank 0, on every rank: as JSON has it, where a path is a text.

        Where it raises on rank 0, the others stop too, instead of waiting for a rank that is gone.
        """
        if self.world_size == 1:
            return decide()
        found, error = None, None
        if self.is_leader:
            try:
                found = decide()
            except BaseException as raised:  # raised again below, once the others know
                error = raised
        failed, found = self._broadcast([error is not None, found])
        if error is not None:
            raise error
        if failed:
            sys.exit(1)
        return found

    def everyones(self, found: Any) -> list:
        """What all ranks have found, by rank, on every rank."""
        if self.world_size == 1:
            return [found]
        return [self._broadcast(found, rank) for rank in range(self.world_size)]

    def _broadcast(self, found: Any, source: int = 0) -> Any:
        """What one rank has found, on every rank."""
        text = json.dumps(found, default=os.fspath)
        sent = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor([len(sent)], device=self.device)
        dist.broadcast(size, src=source)
        mine = self.rank == source
        body = sent if mine else torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(body, src=source)
        return json.loads(bytes(body.tolist()))

    def stop(self, what: str, fix: str) -> None:
        """Never returns: all ranks have found the same mistake, and the first one says it."""
        if self.is_leader:
            raise StageError(what, fix)
        sys.exit(1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, number: int) -> int:
        """The greatest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum .grad over ranks, in the same order on every rank.

        A parameter without one has zeros from here on, alone as among many: an optimizer would pass over it,
        but move it on by its momentum where some other rank had a gradient.
        """
        parameters = list(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in buckets(parameters) if self.world_size > 1 else ():
            flat = torch.cat([p.grad.flatten() for p in bucket])
            dist.all_reduce(flat)
            for p, piece in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad.copy_(piece.view_as(p))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in lists of at most BUCKET elements, or of one tensor."""
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

    After an error it doesn't take leave: the others may be waiting in a collective, and torchrun ends them.
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


def pick_device(local_rank: int = 0) -> torch.device:
    """cuda:local_rank, mps or cpu: the one place where the device is chosen."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Nothing; from here on, the C library keeps what this process frees, for what it asks for next.

    By itself glibc hands large tensors' pages back to the system, and gets each anew, zeroed, in every step.
    """
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, it hands memory of a MiB or more back at once, as it does by itself in a young process.

    Quantised on a CPU, the small new weights would lie between the large old ones and keep their place.
    """
    mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)                           # glibc's own most


def mallopt(parameter: int, value: int) -> None:
    """Nothing; the C library's allocator is set so, where it is glibc's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(parameter, value)


def free_memory_gib(device: torch.device) -> float:
    """Memory that this process may still take: its GPU's, or its share of what this machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available / processes / 2**30


def spread(config, device: torch.device) -> dict | None:
    """transformers' arguments that share one model out over this machine's GPUs, or None.

    A batch goes to the first GPU; accelerate's hooks hand on from layer to layer what the next one needs.
    """
    if config.device_map is None or device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    limits = {int(number): most for number, most in (config.max_memory or {}).items()}
    return {"device_map": config.device_map, "max_memory": limits or None}


def refuse_offload(placed: dict) -> None:
    """Nothing; a StageError where a part of a shared-out model is on no GPU, and so has no gradient."""
    if off := sorted(name for name, where in placed.items() if where in ("cpu", "disk", "meta")):
        raise StageError(f"device_map: {len(off)} parts don't fit into the GPUs, such as {off[0]}",
                         "adapter: qlora, more or larger GPUs, or torchrun with fsdp_version: 2")


def ask_for_bf16(bf16: bool | str, device: torch.device, native=None) -> None:
    """Nothing; a StageError where `bf16: auto` meets a GPU that only emulates it, at a fraction of the speed.

    The plan is the same on every machine: so this doesn't choose another type by itself.
    """
    native = native or functools.partial(torch.cuda.is_bf16_supported, including_emulation=False)
    if bf16 == "auto" and device.type == "cuda" and not native():
        raise StageError("bf16: auto: this GPU has no bfloat16 of its own",
                         "fp16: true (float16 with a gradient scaler), bf16: false (float32), or bf16: true "
                         "(emulated, slow)")


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Inside, CUDA multiplies float32 matrices in TF32, if wanted: ten bits of mantissa, far more speed."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if wanted else "ieee"
        yield
    finally:
        for place, precision in zip(places, before):
            place.fp32_precision = precision


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's own count, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

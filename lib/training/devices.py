"""devices: the device that this process computes on (CUDA, MPS or CPU), its precision and its memory."""
import ctypes
import functools
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from lib.run.errors import StageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3   # of malloc.h


def pick_device(local_rank: int = 0) -> torch.device:
    """cuda:local_rank, mps or cpu: the one place where the device is chosen."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for reuse.

    By default glibc hands the pages of large tensors back to the system, which zeroes new ones in every step.
    """
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, the C library hands freed memory of a MiB or more back at once, as it does in a young process.

    When quantising on a CPU, the small new weights would otherwise lie between the freed large ones, whose
    memory could then not be handed back.
    """
    mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)                           # the most that glibc sets by itself


def mallopt(parameter: int, value: int) -> None:
    """Set a parameter of the C library's allocator, where it is glibc's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(parameter, value)


def free_memory_gib(device: torch.device) -> float:
    """GiB that this process may still take: what its GPU has free, or its share of the machine's free memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available / processes / 2**30


def spread(config, device: torch.device) -> dict | None:
    """transformers' arguments that spread one model over this machine's GPUs; None without device_map.

    None, too, on another device and with a single GPU. A batch goes to the first GPU; accelerate's hooks move
    to each layer's GPU what the layer needs.
    """
    if config.device_map is None or device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    limits = {int(number): most for number, most in (config.max_memory or {}).items()}
    return {"device_map": config.device_map, "max_memory": limits or None}


def refuse_offload(placed: dict) -> None:
    """Raise StageError where a part of a model that GPUs share is on none of them, and would get no gradient.
    """
    if off := sorted(name for name, where in placed.items() if where in ("cpu", "disk", "meta")):
        raise StageError(f"device_map: {len(off)} parts don't fit into the GPUs, such as {off[0]}",
                         "adapter: qlora, more or larger GPUs, or torchrun with fsdp_version: 2")


def refuse_emulated_bf16(bf16: bool | str, device: torch.device, native=None) -> None:
    """Raise StageError where `bf16: auto` meets a GPU that only emulates bfloat16, many times slower.

    No other dtype is chosen here, because the plan is the same on every machine.
    """
    native = native or functools.partial(torch.cuda.is_bf16_supported, including_emulation=False)
    if bf16 == "auto" and device.type == "cuda" and not native():
        raise StageError("bf16: auto: this GPU has no bfloat16 of its own",
                         "fp16: true (float16 with a gradient scaler), bf16: false (float32), or bf16: true "
                         "(emulated, slow)")


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Inside, CUDA multiplies float32 matrices in TF32, if wanted: a mantissa of 10 bits, and much faster."""
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
    """GiB of memory used at most so far: torch's count on a GPU, this process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

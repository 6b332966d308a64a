"""products: matrix products in 16 bits, computed in float32 on CPUs that are faster at that.

Without instructions for bfloat16, as in most laptops, or with slow ones, a CPU multiplies bfloat16 matrices
at a half to a tenth of its float32 rate. A product in 16 bits sums in float32 all the same: here operands are
cast, some at a time, multiplied, and the result is cast back. Weights and activations stay in 16 bits.
"""
import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch

PIECE = 2**21                             # elements of operands and result in float32 at once: 8 MiB
CAST = 48                                 # products of a matrix entry that take as long as its casts


@contextlib.contextmanager
def paths(dtype: torch.dtype, device: torch.device, speed: int | None = None) -> Iterator[int]:
    """Inside, products in `dtype` are computed in float32 where this takes less time; yields how much faster.

    speed: of float32 products, relative to those in dtype; None: `speed_of_float32`. Nothing changes where it
    is 1, on another device than a CPU, and in a torch that doesn't hand out its own kernels.
    """
    could = device.type == "cpu" and hasattr(torch.library, "get_kernel")
    speed = 1 if not could or dtype == torch.float32 else speed or speed_of_float32(dtype)
    if speed == 1:
        yield 1
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, ours in {"mm": mm, "addmm": addmm, "bmm": bmm}.items():
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, partial(ours, own, dtype, CAST / (speed - 1)), "CPU", with_keyset=True)
        yield speed
    finally:
        library._destroy()


def speed_of_float32(dtype: torch.dtype, cpu: Mapping | None = None) -> int:
    """How many times as fast as in `dtype` a CPU multiplies in float32, about; 1 where that isn't known.

    cpu: torch's own words for its instructions; None: this CPU's. They decide, and no clock does, because a
    run that is resumed, and each rank of a run, has to find the same.
    """
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if cpu is None else cpu
    if cpu.get("architecture") != "x86_64" or cpu.get("avx_ne_convert"):
        return 1
    if dtype == torch.float16:
        return 1 if cpu.get("amx_fp16") or cpu.get("avx512_fp16") else 8
    if cpu.get("amx_bf16") or cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", ""):
        return 1
    return 2 if cpu.get("avx512_bf16") else 4 if cpu.get("avx512_f") else 8


def pays(least: float, rows: int, inner: int, columns: int) -> bool:
    """Whether entries meet enough others in a product [rows, inner] x [inner, columns] to be worth a cast."""
    return rows * inner * columns > least * (rows * inner + inner * columns + rows * columns)


def mm(own, dtype, least, keys, a, b):
    """a [M, K] b [K, N]."""
    if a.dtype != dtype or not pays(least, *a.shape, b.shape[1]):
        return own.call_boxed(keys, a, b)
    return wide(a, b)


def addmm(own, dtype, least, keys, bias, a, b, beta=1, alpha=1):
    """bias + a [M, K] b [K, N]; bias: of any shape that expands to [M, N]."""
    if a.dtype != dtype or not beta == alpha == 1 or not pays(least, *a.shape, b.shape[1]):
        return own.call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)
    return wide(a, b, bias)


def bmm(own, dtype, least, keys, a, b):
    """a [B, M, K] b [B, K, N], each pair apart."""
    if a.dtype != dtype or not pays(least, *a.shape[1:], b.shape[2]):
        return own.call_boxed(keys, a, b)
    out = a.new_empty(*a.shape[:2], b.shape[2])
    size = max(1, PIECE // (a[0].numel() + b[0].numel() + out[0].numel()))
    for x, y, into in zip(a.split(size), b.split(size), out.split(size)):
        into.copy_(torch.bmm(x.float(), y.float(), out=into.new_empty(into.shape, dtype=torch.float32)))
    return out


def wide(a: torch.Tensor, b: torch.Tensor, bias=None) -> torch.Tensor:
    """(bias +) a [M, K] b [K, N] in a's dtype, of float32 products, cut along the longest of M, K and N."""
    (rows, inner), columns = a.shape, b.shape[1]
    pieces = math.ceil((a.numel() + b.numel() + rows * columns) / PIECE)
    if inner > max(rows, columns):
        total = torch.zeros(rows, columns)
        if bias is not None:
            total += bias
        size = math.ceil(inner / pieces)
        for x, y in zip(a.split(size, 1), b.split(size)):
            torch.addmm(total, x.float(), y.float(), out=total)
        return total.to(a.dtype)
    out = a.new_empty(rows, columns)
    axis = 0 if rows > columns else 1
    size = math.ceil(max(rows, columns) / pieces)
    parts = (a.split(size), [b.float()] * pieces) if axis == 0 else ([a.float()] * pieces, b.split(size, 1))
    biases = [None] * pieces if bias is None else bias.expand(rows, columns).split(size, axis)
    for x, y, onto, into in zip(*parts, biases, out.split(size, axis)):
        found = torch.mm(x.float(), y.float(), out=into.new_empty(into.shape, dtype=torch.float32))
        into.copy_(found if onto is None else found.add_(onto))
    return out

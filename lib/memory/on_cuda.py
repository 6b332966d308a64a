"""on_cuda: the memory that CUDA's allocator and kernels would take for hollow tensors (lib/memory/hollow.py).

Stand-ins for kernels compute nothing: they make results and keep tensors of the right sizes.

Fork me to: count another device's (`cuda_kernels`).
"""
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F


def taken_on_cuda(size: int) -> int:
    """The bytes that CUDA's allocator takes for a tensor of `size` bytes.

    It hands out multiples of 512 bytes. From 10 MiB on it asks the device for whole multiples of 2 MiB, and
    cuts off what is left over only where that is more than 1 MiB.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/c10/cuda/CUDACachingAllocator.cpp
    """
    size = -(-size // 512) * 512
    whole = -(-size // 2**21) * 2**21
    return whole if size >= 10 * 2**20 and whole - size <= 2**20 else size


def cuda_kernels():
    """A context in which attention and norms take the memory that CUDA's fused kernels would.

    It replaces functions of torch.nn.functional, since a mode of torch's isn't active in layers that the
    backward runs again.
    """
    new = {name: partial(in_float32, getattr(F, name)) for name in ("layer_norm", "group_norm", "softmax")}
    return patch.multiple(F, scaled_dot_product_attention=attention, rms_norm=Norm.apply, **new)


def in_float32(function, tensor: torch.Tensor, *words, **options) -> torch.Tensor:
    """A function's result in float32 under autocast, as CUDA's autocast computes it."""
    return function(tensor.float() if torch.is_autocast_enabled("cpu") else tensor, *words, **options)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False) -> torch.Tensor:
    """Attention's output [B, H, T, D], of which the backward keeps no scores, only one sum for each row."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return Attention.apply(query, key, value, None if attn_mask is None else attn_mask.to(query.dtype))


class Attention(torch.autograd.Function):
    """The memory of attention in one kernel, cuDNN's on a Hopper: it keeps its output, laid out as the query.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        alike = value.shape[-1] == query.shape[-1]
        out = torch.empty_like(query) if alike else query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


class Norm(torch.autograd.Function):
    """The memory of an RMSNorm in one kernel, which keeps its input and a float for each row."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


class FewBits(torch.autograd.Function):
    """The memory of x W^T by bitsandbytes: W is dequantised while it is used, in forward and backward.

    keeps_input: with 8 bits, x is kept out of checkpointing's reach, until the graph is freed.
    """

    @staticmethod
    def forward(ctx, x, packed, shape, keeps_input):
        ctx.save_for_backward(packed)
        ctx.shape, ctx.kept = shape, x if keeps_input else None
        return x @ packed.new_empty(shape, dtype=x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        (packed,) = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape, dtype=grad.dtype), None, None, None

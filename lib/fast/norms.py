"""norms: frozen RMSNorms and LayerNorms in few operations, where the libraries take a dozen.

On a GPU torch's fused kernel computes an RMSNorm, and a LayerNorm keeps its input's dtype, which autocast
would widen. A CPU has no fused kernel: there `Norm` computes an RMSNorm, with its gradient by hand, and keeps
no float32 tensor for the backward. Used inside lib/fast's `paths` only.
"""
import copy
import inspect
from functools import partial

import torch
import torch.nn.functional as F


def forward_of(module, cuda: bool):
    """The fast forward of a frozen norm; None for any other module. cuda: the one for a GPU."""
    if (one := kind_of(module)) is not None:
        return partial(fused_forward if cuda else plain_forward, module, one)
    if cuda and type(module) is torch.nn.LayerNorm and not any(p.requires_grad for p in module.parameters()):
        return partial(layer_norm_forward, module)
    return None


def kind_of(module) -> int | None:
    """What a frozen RMSNorm adds to its weight: 0, or 1 as in Gemma; None for any other module.

    What the module computes, on a copy with other weights, shows whether it is such a norm.
    """
    weight, eps = getattr(module, "weight", None), epsilon_of(module)
    takes = inspect.signature(type(module).forward).parameters
    if ("RMSNorm" not in type(module).__name__ or eps is None or weight is None or weight.requires_grad
            or len(list(module.parameters())) != 1 or len(takes) != 2):             # others take a gate, too
        return None
    chance, twin = torch.Generator().manual_seed(0), copy.copy(module)
    x, other = (torch.randn(rows, *weight.shape, generator=chance) for rows in (4, 1))
    twin._parameters = {"weight": torch.nn.Parameter(other[0], False)}
    found = type(module).forward(twin, x)
    return next((one for one in (0, 1) if torch.allclose(
        found, F.rms_norm(x, weight.shape, one + other[0], eps), rtol=1e-4, atol=1e-5)), None)


def epsilon_of(norm) -> float | None:
    """The epsilon that an RMSNorm adds to the mean square; None where it names none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def plain_forward(module, one: int, x: torch.Tensor) -> torch.Tensor:
    """An RMSNorm's output [..., D] on a CPU, in x's dtype; one: what it adds to its weight."""
    return Norm.apply(x, module.weight.to(x.dtype), one, epsilon_of(module))


class Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (one + weight), for a frozen weight [D].

    As in the libraries, it is computed in float32, except the product with a plain weight (one is 0).

    Source: RMSNorm (arXiv 1910.07467), equation 4; its gradient by hand: with n the normalised x, s the scale
    1 / sqrt(…) and g the output's gradient times (one + weight), dx = s (g - n mean(g n)).
    """

    @staticmethod
    def forward(ctx, x, weight, one, eps):
        wide = x.to(torch.float32, copy=True)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()            # [..., 1]
        ctx.save_for_backward(x, scale, weight)
        ctx.one, wide = one, wide.mul_(scale)
        return wide.mul_(one + weight.float()).to(x.dtype) if one else wide.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        n = x.to(torch.float32, copy=True).mul_(scale)
        g = grad.to(torch.float32, copy=True).mul_(ctx.one + weight.float())
        mean = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(x.shape[-1])         # [..., 1]
        return g.addcmul_(n, mean, value=-1).mul_(scale).to(x.dtype), None, None, None


def fused_forward(module, one: int, x: torch.Tensor) -> torch.Tensor:
    """An RMSNorm's output [..., D] by torch's fused kernel, in x's dtype; one: what it adds to its weight.

    With one = 1 the result is rounded twice, as most norms are.
    """
    shape, weight, eps = x.shape[-1:], module.weight.to(x.dtype), epsilon_of(module)
    with torch.autocast(x.device.type, enabled=False):
        if one:                           # 1 + weight has more digits than bf16 holds: addcmul keeps them
            out = F.rms_norm(x, shape, None, eps)
            return torch.addcmul(out, out, weight)
        return F.rms_norm(x, shape, weight, eps)


def layer_norm_forward(module, x: torch.Tensor) -> torch.Tensor:
    """A LayerNorm's output [..., D] in x's dtype; inside, the kernel computes in float32."""
    own = (None if p is None else p.to(x.dtype) for p in (module.weight, module.bias))
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, module.normalized_shape, *own, module.eps)

"""gpu: frozen layers of which a GPU has better kernels than those that the libraries call.

torch's one fused kernel stands in for the dozen that an RMSNorm is, a LayerNorm keeps its input's type, which
autocast would widen, and layers whose rows begin at odd places, for which only slow kernels are left, are
filled up with zeros; inside lib/fast.py's `paths` only.
"""
import copy
import inspect
from functools import partial

import torch
import torch.nn.functional as F

ALIGNED = 8                               # elements of 2 bytes: a row begins at a multiple of 16 bytes


def forward_of(module):
    """The fast forward of a frozen layer, or None."""
    if (one := norm_kind(module)) is not None:
        return partial(norm_forward, module, one)
    if type(module) is torch.nn.LayerNorm and not any(p.requires_grad for p in module.parameters()):
        return partial(layer_norm_forward, module)
    if is_odd(module):
        return partial(odd_forward, *filled_up(module), module.out_features)
    return None


def norm_kind(module) -> int | None:
    """What a frozen RMSNorm adds to its weight, 0 or 1 as in Gemma's; None where it is no such norm.

    That it is one is seen by what it computes, on a copy with other weights.
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
    """What an RMSNorm adds to the mean square."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def norm_forward(module, one: int, x: torch.Tensor) -> torch.Tensor:
    """The norm's output [..., D], in x's type; with 1 + weight it is rounded twice, as most norms are."""
    shape, weight, eps = x.shape[-1:], module.weight.to(x.dtype), epsilon_of(module)
    with torch.autocast(x.device.type, enabled=False):
        if one:                           # 1 + weight has more digits than bf16: it is formed within a kernel
            out = F.rms_norm(x, shape, None, eps)
            return torch.addcmul(out, out, weight)
        return F.rms_norm(x, shape, weight, eps)


def layer_norm_forward(module, x: torch.Tensor) -> torch.Tensor:
    """The norm's output [..., D], in x's type; what a kernel computes within is float32."""
    own = (None if p is None else p.to(x.dtype) for p in (module.weight, module.bias))
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, module.normalized_shape, *own, module.eps)


def is_odd(module) -> bool:
    """Whether a frozen linear layer on a GPU has rows that begin where its fast kernels can't."""
    return (type(module) is torch.nn.Linear and module.weight.is_cuda and module.weight.element_size() == 2
            and not any(p.requires_grad for p in module.parameters())
            and any(size % ALIGNED for size in module.weight.shape))


def filled_up(module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of an odd layer with zeros behind; its own weight is a part of that from now on."""
    more = [-size % ALIGNED for size in module.weight.shape]
    weight = F.pad(module.weight.data, (0, more[1], 0, more[0]))
    module.weight.data = weight[:module.out_features, :module.in_features]
    return weight, None if module.bias is None else F.pad(module.bias.data, (0, more[0]))


def odd_forward(weight, bias, outputs: int, x: torch.Tensor) -> torch.Tensor:
    """The layer's output [..., outputs] of x [..., in]."""
    return F.linear(F.pad(x, (0, weight.shape[1] - x.shape[-1])), weight, bias)[..., :outputs]

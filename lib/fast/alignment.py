"""alignment: frozen linear layers of odd sizes, zero-padded so that a GPU's fast kernels can take them.

Unpadded, rows of 3,420 columns in 16 bits, as a tower's layers have them, don't begin at multiples of 16
bytes, and only slow kernels are left. Used inside lib/fast's `paths` only.
"""
from functools import partial

import torch
import torch.nn.functional as F

ALIGNED = 8                               # elements of 2 bytes: rows then begin at multiples of 16 bytes


def forward_of(module):
    """The forward of a frozen linear layer of odd size, by padded weights; None for any other module."""
    return partial(odd_forward, *filled_up(module), module.out_features) if is_odd(module) else None


def is_odd(module) -> bool:
    """Whether a module is a frozen linear layer on a GPU, of a size that its fast kernels can't take."""
    return (type(module) is torch.nn.Linear and module.weight.is_cuda and module.weight.element_size() == 2
            and not any(p.requires_grad for p in module.parameters())
            and any(size % ALIGNED for size in module.weight.shape))


def filled_up(module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of an odd layer, zero-padded at the end; the layer's own weight becomes a view of it."""
    more = [-size % ALIGNED for size in module.weight.shape]
    weight = F.pad(module.weight.data, (0, more[1], 0, more[0]))
    module.weight.data = weight[:module.out_features, :module.in_features]
    return weight, None if module.bias is None else F.pad(module.bias.data, (0, more[0]))


def odd_forward(weight, bias, outputs: int, x: torch.Tensor) -> torch.Tensor:
    """A padded layer's output [..., outputs] of x [..., in]."""
    return F.linear(F.pad(x, (0, weight.shape[1] - x.shape[-1])), weight, bias)[..., :outputs]

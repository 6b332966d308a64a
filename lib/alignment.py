"""alignment: frozen linear layers for which only a GPU's slow kernels are left, filled up with zeros.

Their rows begin at odd places, as those of a tower's layers of 3,420 columns do. Inside lib/fast.py's `paths`
only.
"""
from functools import partial

import torch
import torch.nn.functional as F

ALIGNED = 8                               # elements of 2 bytes: a row begins at a multiple of 16 bytes


def forward_of(module):
    """The fast forward of such a layer, or None for any other."""
    return partial(odd_forward, *filled_up(module), module.out_features) if is_odd(module) else None


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

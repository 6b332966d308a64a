"""fast: the model's inner parts with the libraries' results, computed in fewer and larger operations.

attention.py computes attention (on a CPU blocks.py), adapted.py LoRA layers, norms.py norms; last.py leaves
out of the last layer what nothing depends on, alignment.py pads layers that a GPU would be slow at, and
features.py and store.py keep a frozen tower's features.
`rows_forward` stands in for peft's layers with some rows that train, which copy the whole matrix each time.
products.py, which has its own `paths`, is for CPUs that are slow at products in 16 bits.

All others are used inside `paths(model, roles)` only: what is saved, shown and compared, the libraries
compute.
"""
import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from lib.fast import adapted, alignment, attention, features, last, norms
from lib.models.roles import Roles


@contextlib.contextmanager
def paths(model, roles: Roles, cuda: bool | None = None) -> Iterator[None]:
    """Inside, the model takes the fast paths. cuda: those of a GPU; None: if the model is on one."""
    language = {module for name, module in model.named_modules() if roles.of(name) == "language"}
    cuda = next(model.parameters()).is_cuda if cuda is None else cuda
    fast = {module: forward for module in model.modules() if (forward := forward_of(module, cuda))}
    fast |= {part: partial(last.forward, fast.get(part, part.forward)) for part in last.parts(model, roles)}
    own = {module: vars(module)["forward"] for module in fast if "forward" in vars(module)}  # accelerate's
    for module, forward in fast.items():
        module.forward = forward
    watch = register_optimizer_step_post_hook(lambda *_: adapted.Cast.forget())
    try:
        with attention.paths(model, language, roles.guessed):
            yield
    finally:
        watch.remove()
        for module in fast:
            del module.forward
        for module, forward in own.items():
            module.forward = forward


def of_batch(batch: dict) -> dict:
    """Inputs that the model takes besides the batch's own; what the fast paths need of the batch is noted.

    An empty batch makes them forget the one before.
    """
    attention.of_batch(batch)
    last.of_batch(batch)
    return features.of_batch(batch)


def forward_of(module, cuda: bool):
    """The fast forward of a module; None where it has none."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    if forward := adapted.forward_of(module) or norms.forward_of(module, cuda):
        return forward
    if isinstance(module, TrainableTokensLayer):
        return partial(rows_forward, module, ids_of(module))
    if type(module) in (torch.nn.Conv2d, torch.nn.Conv3d) and not module.weight.requires_grad:
        return partial(patches_forward, module)
    return alignment.forward_of(module) if cuda else None


# ---- patches ----

def patches_forward(module, x: torch.Tensor) -> torch.Tensor:
    """A frozen convolution's output; of single patches [N, C, *kernel_size], by one matrix product."""
    if x.shape[2:] != module.kernel_size or any(module.padding) or module.groups > 1:
        return type(module).forward(module, x)
    out = F.linear(x.flatten(1), module.weight.flatten(1), module.bias)
    return out.view(*out.shape, *[1] * len(module.kernel_size))


# ---- rows of new tokens ----

def ids_of(module) -> torch.Tensor:
    """The ids [R], ascending, of the tokens whose rows train in an embedding or a head."""
    (name,) = module.active_adapters
    return torch.tensor(module.token_indices[name], device=module.get_base_layer().weight.device)


def rows_forward(module, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """An embedding's output [..., D] or a head's [..., V], with the trained rows in place of the base's."""
    (name,), base = module.active_adapters, module.get_base_layer()
    out = base(x)
    rows = module.trainable_tokens_delta[name].to(out.dtype)                     # [R, D]
    if isinstance(base, torch.nn.Linear):
        return out.index_copy(-1, ids, F.linear(x, rows).to(out.dtype))
    scale = module._get_embed_scale()                                            # of Gemma's embeddings
    places = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
    new = rows[places] if scale is None else rows[places] * scale.to(out.dtype)
    return torch.where((ids[places] == x)[..., None], new, out)

"""adapted: peft's LoRA layers on frozen linear layers, computed in fewer and larger operations.

`AdaptedLinear` stands in for such a layer's forward: one node of the autograd graph, no float32 copy of its
input, and the update added in place to the base's product. In an MLP with a gate it recomputes its input, the
widest tensor of a layer, in the backward instead of keeping it.

Source: LoRA (arXiv 2106.09685); QLoRA (arXiv 2305.14314).
"""
import contextlib
import copy
import functools
import inspect
from functools import partial

import torch


def forward_of(module):
    """The fast forward of a plain LoRA layer, or of a gated MLP that ends in one; None for any other."""
    if is_plain_lora(module):
        return partial(adapted_forward, Cast.of_layer(module), module.get_base_layer())
    if is_gated(module) and is_plain_lora(module.down_proj):
        return partial(gated_forward, module, Cast.of_layer(module.down_proj))
    return None


def is_plain_lora(module) -> bool:
    """Whether a module is peft's LoRA on a frozen linear layer: one adapter, no dropout, no variant."""
    adapts = kinds_of_lora().get(type(module))
    if adapts is None or type(module.get_base_layer()) is not adapts:
        return False
    (name, *others), base = module.active_adapters, module.get_base_layer()
    return (not others and name in module.lora_A and not module.lora_variant and not module.lora_bias[name]
            and isinstance(module.lora_dropout[name], torch.nn.Identity) and not module.disable_adapters
            and not module.merged and not any(p.requires_grad for p in base.parameters()))


@functools.cache
def kinds_of_lora() -> dict[type, type]:
    """{peft's class: the class of the linear layers that it adapts}, unquantised or in 4 bits."""
    from peft.import_utils import is_bnb_4bit_available
    from peft.tuners.lora.layer import Linear
    kinds = {Linear: torch.nn.Linear}
    if is_bnb_4bit_available():
        import bitsandbytes
        from peft.tuners.lora.bnb import Linear4bit
        kinds[Linear4bit] = bitsandbytes.nn.Linear4bit
    return kinds


class Cast:
    """A layer's A and B in the dtype of its matrix products, cast anew only after an optimizer has stepped.

    updates: steps that optimizers have taken, all together. Tensors' version counters don't show them all: a
    fused optimizer doesn't raise these.
    """
    updates = 0

    def __init__(self, a: torch.nn.Parameter, b: torch.nn.Parameter, scaling: float):
        self.a, self.b, self.scaling = a, b, scaling
        self.of = self.made = None

    @classmethod
    def of_layer(cls, module) -> "Cast":
        """The Cast of one of peft's LoRA layers."""
        (name,) = module.active_adapters
        return cls(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])

    @classmethod
    def forget(cls) -> None:
        """Note that an optimizer has stepped: whatever was cast before is out of date."""
        cls.updates += 1

    def __call__(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, in], scaling times B [out, r]), both in this dtype."""
        now = Cast.updates, self.a._version, self.b._version, dtype
        if self.of != now:
            self.of, self.made = now, (self.a.detach().to(dtype), (self.b.detach() * self.scaling).to(dtype))
        return self.made


def adapted_forward(cast: Cast, base, x: torch.Tensor) -> torch.Tensor:
    """A LoRA layer's output [..., out] of x [..., in]."""
    return AdaptedLinear.apply(cast.a, cast.b, cast, base, None, x)


class AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, for a frozen W; products in W's dtype, gradients in A's and B's.

    make: computes x from `parts`, which are kept in its place; None where x is the one part.

    Source: LoRA (arXiv 2106.09685), equation 3; gradients by hand: with u = x A^T, g the output's gradient
    and s the scaling, dx = g W + s (g B) A, dA = s (g B)^T x, dB = s g^T u. A W in 4 bits (QLoRA, arXiv
    2305.14314) is dequantised only while it is used.
    """

    @staticmethod
    def forward(ctx, a, b, cast, base, make, *parts):
        few_bits = type(base) is not torch.nn.Linear
        x = make(*parts) if make else parts[0]
        dtype = (base.compute_dtype or x.dtype) if few_bits else base.weight.dtype
        with no_cast(x.device.type, dtype):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)                          # [N, in]
            down, up = cast(dtype)                                               # [r, in], [out, r]
            u = rows @ down.T                                                    # [N, r]
            out = base(rows.view(x.shape))                                       # [..., out]
            out.view(-1, out.shape[-1]).addmm_(u, up.T)
        ctx.save_for_backward(u, down, up, base.weight, *(parts if make else [rows]))
        ctx.packing = (getattr(base.weight, "quant_state", None) or base.quant_state) if few_bits else None
        ctx.make, ctx.scaling, ctx.types = make, cast.scaling, (x.dtype, a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        u, down, up, weight, *parts = ctx.saved_tensors
        learns, slopes = ctx.needs_input_grad[5:], [None] * len(parts)
        if ctx.make:
            parts = [part.detach().requires_grad_() for part in parts]   # gradients nobody asked for: dropped
        with torch.enable_grad():
            x = ctx.make(*parts) if ctx.make else parts[0]
        rows = x.detach().reshape(-1, x.shape[-1]).to(down.dtype)
        with no_cast(grad.device.type, rows.dtype):
            g = grad.reshape(-1, grad.shape[-1])
            gu = g @ up                                                          # [N, r]
            grad_a, grad_b = gu.T @ rows, (u.T @ g).T * ctx.scaling
            if any(learns):
                weight = dequantised(weight, ctx.packing).to(g.dtype) if ctx.packing else weight
                dx = (g @ weight).addmm_(gu, down).view(*grad.shape[:-1], -1).to(ctx.types[0])
                slopes = torch.autograd.grad(x, parts, dx) if ctx.make else [dx]
        return grad_a.to(ctx.types[1]), grad_b.to(ctx.types[2]), None, None, None, *slopes


def is_gated(module) -> bool:
    """Whether a module is an MLP with a gate, down(act(gate(x)) * up(x)).

    Its modules' names suggest it; what it computes, on a copy with other modules inside, shows it.
    """
    names = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    if module._modules.keys() != names or len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    x, twin = torch.linspace(-2, 2, 16), copy.copy(module)
    twin._modules = module._modules | {"gate_proj": torch.cos, "up_proj": torch.exp, "down_proj": torch.tanh}
    found = type(module).forward(twin, x)             # without what accelerate hooks onto it
    return torch.allclose(found, torch.tanh(module.act_fn(x.cos()) * x.exp()))


def gated_forward(module, cast: Cast, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP's output [..., D] of x [..., D]."""
    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return module.act_fn(gate) * up
    base = module.down_proj.get_base_layer()
    return AdaptedLinear.apply(cast.a, cast.b, cast, base, product, module.gate_proj(x), module.up_proj(x))


def no_cast(device_type: str, dtype: torch.dtype):
    """A context in which autocast leaves tensors of this dtype as they are.

    It does nothing where autocast would do so anyway, since switching autocast off takes time.
    """
    if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) == dtype:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def dequantised(weight: torch.Tensor, packing) -> torch.Tensor:
    """The matrix [out, in] that bitsandbytes' weight in 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit
    return dequantize_4bit(weight, packing)

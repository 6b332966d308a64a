"""fast: two of the loop's inner parts, computed as the libraries compute them, in fewer and larger pieces.

`attend` stands in for transformers' sdpa attention. In a packed row it computes each sample's own square of
the scores, not the whole row's, of which the mask would hide all but those squares. On a CPU, whose fused
kernel reaches a quarter of the machine's matrix rate, short squares are two plain matrix products.
`AdaptedLinear` stands in for the forward of peft's LoRA layers: one node of the graph, no float32 copy of its
input, and the update added where the base's product already lies.
`rows_forward` stands in for peft's layers with some rows that train, which copy the whole matrix each time.

All hold inside `paths(model, roles)` only: what is saved, shown and compared is computed by the libraries.

Fork me to: try another kernel (`squares`).
"""
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from lib.adapter import base_name
from lib.roles import Roles

SHORT = 640                               # tokens up to which scores stay in a CPU's cache

packed_rows: list[list[int]] | None = None  # tokens of each sample, row by row, of the batch in hand


@contextmanager
def paths(model, roles: Roles) -> Iterator[None]:
    """Inside, the model's language attention and its LoRA layers take the fast paths."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS
    language = {module for name, module in model.named_modules() if roles.of(base_name(name)) == "language"}
    own = {module: partial(adapted_forward, module) for module in model.modules() if is_plain_lora(module)}
    own |= {module: partial(rows_forward, module, ids_of(module)) for module in model.modules()
            if isinstance(module, TrainableTokensLayer)}
    library = KERNELS["sdpa"]
    KERNELS["sdpa"] = partial(attend, library, language)
    for module, forward in own.items():
        module.forward = forward
    try:
        yield
    finally:
        KERNELS["sdpa"] = library
        for module in own:
            del module.forward


def of_batch(batch: dict) -> None:
    """Nothing; says what the next forward's rows hold, and its backward's, where layers run again."""
    global packed_rows
    packed_rows = batch.get("packed_rows")


# ---- attention ----

def attend(library, language: set, module, query, key, value, attention_mask, dropout=0.0, scaling=None,
           is_causal=None, **options):
    """(attention's output [B, T, H, D], None), by `squares` where it holds, else by the library's function.

    query [B, H, T, D], key and value [B, G, T, D] for G groups of heads, attention_mask [B, 1, T, T] or None.
    """
    tokens = query.shape[2]
    known = not dropout and tokens == key.shape[2] > 1 and not any(
        options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    rows = packed_rows if module in language and attention_mask is not None else None
    if not known or rows is None and (query.device.type != "cpu" or tokens > SHORT):
        return library(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                       is_causal=is_causal, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if rows is None:
        return squares(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    filled = []
    for row, lengths in enumerate(rows):
        parts = [*lengths, tokens - sum(lengths)]
        samples = [x[row:row + 1].split(parts, dim=2) for x in (query, key, value)]
        pieces, start = [], 0
        for length, *sample in zip(lengths, *samples):
            own = attention_mask[row:row + 1, :, start:start + length, start:start + length]
            pieces.append(squares(*sample, own, scaling))
            start += length
        filled.append(F.pad(torch.cat(pieces, dim=2), (0, 0, 0, tokens - start)))
    return torch.cat(filled).transpose(1, 2).contiguous(), None                  # [B, T, H, D]


def squares(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Attention's output [B, H, T, D]; mask [B, 1, T, T] is bool, or added to the scores, or None."""
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    if query.device.type != "cpu" or tokens > SHORT:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                              enable_gqa=groups != heads)
    # Products of matrices that lie in memory as they are read: on transposed views sdpa would be faster.
    query = (query * scaling).reshape(batch * groups, heads // groups * tokens, width)
    key, value = (x.reshape(batch * groups, tokens, x.shape[-1]) for x in (key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, heads, tokens, tokens)
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden = torch.finfo(scores.dtype).min
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, hidden)
        scores = scores + mask
    weights = scores.softmax(-1).view(batch * groups, -1, tokens)
    return torch.bmm(weights, value).view(batch, heads, tokens, -1)


# ---- LoRA ----

def is_plain_lora(module) -> bool:
    """Whether a module is peft's LoRA on a plain frozen linear layer: one adapter, no dropout, no variant."""
    from peft.tuners.lora.layer import Linear
    if type(module) is not Linear or type(module.get_base_layer()) is not torch.nn.Linear:
        return False
    (name, *others), base = module.active_adapters, module.get_base_layer()
    return (not others and name in module.lora_A and not module.lora_variant and not module.lora_bias[name]
            and isinstance(module.lora_dropout[name], torch.nn.Identity) and not module.disable_adapters
            and not module.merged and not any(p.requires_grad for p in base.parameters()))


def adapted_forward(module, x: torch.Tensor) -> torch.Tensor:
    """The layer's output [..., out] of x [..., in]."""
    (name,), base = module.active_adapters, module.get_base_layer()
    return AdaptedLinear.apply(x, base.weight, base.bias, module.lora_A[name].weight,
                               module.lora_B[name].weight, module.scaling[name])


class AdaptedLinear(torch.autograd.Function):
    """x W^T + b + scaling (x A^T) B^T, for a frozen W. Products in W's type, gradients of A and B in theirs.

    Source: LoRA (arXiv 2106.09685), equation 3; gradients by hand: with u = x A^T and g the output's,
    dx = g W + s (g B) A, dA = s (g B)^T x, dB = s g^T u.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)                   # [N, in]
            down, up = a.to(weight.dtype), (b * scaling).to(weight.dtype)        # [r, in], [out, r]
            u = rows @ down.T                                                    # [N, r]
            out = F.linear(rows.view(x.shape), weight, bias)                     # [..., out]
            out.view(-1, out.shape[-1]).addmm_(u, up.T)
        ctx.save_for_backward(rows, u, weight, down, up)
        ctx.scaling, ctx.types = scaling, (x.dtype, a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, u, weight, down, up = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1])
            gu = g @ up                                                          # [N, r]
            grad_a, grad_b = gu.T @ rows, (u.T @ g).T * ctx.scaling
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (g @ weight).addmm_(gu, down).view(*grad.shape[:-1], -1).to(ctx.types[0])
        return dx, None, None, grad_a.to(ctx.types[1]), grad_b.to(ctx.types[2]), None


# ---- rows of new tokens ----

def ids_of(module) -> torch.Tensor:
    """The tokens [R], in rising order, whose rows train in an embedding or a head."""
    (name,) = module.active_adapters
    return torch.tensor(module.token_indices[name], device=module.get_base_layer().weight.device)


def rows_forward(module, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, [..., D] of tokens or [..., V] of hidden states, new rows in the base's places."""
    (name,), base = module.active_adapters, module.get_base_layer()
    out = base(x)
    rows = module.trainable_tokens_delta[name].to(out.dtype)                     # [R, D]
    if isinstance(base, torch.nn.Linear):
        return out.index_copy(-1, ids, F.linear(x, rows).to(out.dtype))
    scale = module._get_embed_scale()                                            # of Gemma's embeddings
    places = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
    new = rows[places] if scale is None else rows[places] * scale.to(out.dtype)
    return torch.where((ids[places] == x)[..., None], new, out)

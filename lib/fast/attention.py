"""attention: faster attention: scores that a mask would hide aren't computed, short sequences run together.

`attend` stands in for transformers' sdpa attention of the language model. In a packed row it computes only
each sample's own square of the scores, since the mask hides the rest of the row's: on a GPU with one kernel
for samples of all lengths, on a CPU with lib/fast/blocks.py, sample by sample.
`pieces` stands in for what transformers does in a tower whose pictures or windows are concatenated: it calls
the kernel for each of them, thousands of times in a step, where one call for each length is enough.

Both are used inside `paths` only. Fork me to: try another kernel (`squares`, `flash`).
"""
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from lib.fast import blocks

PIECES = "flash_of_pieces"                # towers hand all pieces at once to a kernel named "flash…"
HALF = (torch.bfloat16, torch.float16)

packed_rows: list[list[int]] | None = None  # tokens of each sample of the current batch, row by row
own_masks = False                         # whether the current batch brought masks that aren't plainly causal


def of_batch(batch: dict) -> None:
    """Note which samples this batch's rows hold, for its forward and what of it the backward runs again."""
    global packed_rows, own_masks
    packed_rows, own_masks = batch.get("packed_rows"), "attention_mask" in batch


@contextmanager
def paths(model, language: set, guessed: bool) -> Iterator[None]:
    """Inside, these modules of the language model, and towers of many pieces, take the fast attention.

    guessed: whether the family has no record, so that nothing says whether its masks are plainly causal.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS
    towers = [module.config for module in model.modules() if hands_over_pieces(module)]
    library = KERNELS["sdpa"]
    KERNELS["sdpa"], KERNELS[PIECES] = partial(attend, library, language, guessed), pieces
    for config in towers:
        config._attn_implementation = PIECES
    try:
        yield
    finally:
        KERNELS["sdpa"] = library
        for config in towers:
            config._attn_implementation = "sdpa"
        del KERNELS[PIECES]


def hands_over_pieces(module) -> bool:
    """Whether a module is a tower's attention that hands all pieces at once to a flash kernel."""
    config = getattr(module, "config", None)
    return (getattr(config, "_attn_implementation", None) == "sdpa"
            and not getattr(module, "attention_dropout", 0.0)
            and "cu_seqlens" in inspect.signature(type(module).forward).parameters
            and "cu_seq_lens_q" in inspect.getsource(type(module).forward))


# ---- the language model ----

def attend(library, language: set, guessed: bool, module, query, key, value, attention_mask, dropout=0.0,
           scaling=None, is_causal=None, **options):
    """(attention's output [B, T, H, D], None), by `flash` or `squares` where they apply, else by the library.

    query [B, H, T, D], key and value [B, G, T, D] for G groups of heads, attention_mask [B, 1, T, T] or None.
    """
    tokens = query.shape[2]
    known = not dropout and tokens == key.shape[2] > 1 and not any(
        options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    rows = packed_rows if module in language and attention_mask is not None else None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not known or rows is None and not blocks.are_here(query):
        return library(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                       is_causal=is_causal, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rows is None:
        if attention_mask is None and is_causal:
            attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
        return squares(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    if has_flash(query) and not guessed and is_plainly_causal(module, rows):
        return packed_flash(query, key, value, rows, scaling), None
    return packed_squares(query, key, value, rows, attention_mask, scaling), None


def packed_flash(query, key, value, rows: list[list[int]], scaling: float) -> torch.Tensor:
    """Attention's output [B, T, H, D] of packed rows, all samples in one call of the kernel."""
    tokens = query.shape[2]
    lengths = [length for row in rows for length in (*row, tokens - sum(row)) if length]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(query.device, non_blocking=True)
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))                # [B*T, heads, D]
    return flash(*flat, ends, max(lengths), scaling, True).view(-1, tokens, *query.shape[1::2])


def packed_squares(query, key, value, rows: list[list[int]], mask, scaling: float) -> torch.Tensor:
    """Attention's output [B, T, H, D] of packed rows, each sample's own square of the scores apart."""
    tokens, filled = query.shape[2], []
    for row, lengths in enumerate(rows):
        parts = [*lengths, tokens - sum(lengths)]
        samples = [x[row:row + 1].split(parts, dim=2) for x in (query, key, value)]
        squared, start = [], 0
        for length, *sample in zip(lengths, *samples):
            own = mask[row:row + 1, :, start:start + length, start:start + length]
            squared.append(squares(*sample, own, scaling))
            start += length
        filled.append(F.pad(torch.cat(squared, dim=2), (0, 0, 0, tokens - start)))
    return torch.cat(filled).transpose(1, 2).contiguous()


def is_plainly_causal(module, rows: list[list[int]]) -> bool:
    """Whether within a sample each token sees itself and all tokens before it, and no others.

    Not so where a picture's tokens see one another in both directions, or where a window hides some.
    """
    windows = (getattr(module, "sliding_window", None),
               getattr(getattr(module, "config", None), "attention_chunk_size", None))
    return not own_masks and max(map(max, rows)) <= min(filter(None, windows), default=math.inf)


def squares(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Attention's output [B, H, T, D]; mask [B, 1, T, T] is bool, or added to the scores, or None."""
    if blocks.are_here(query):
        return blocks.attend(query, key, value, mask, scaling)
    heads, groups = query.shape[1], key.shape[1]
    if mask is not None:                  # with a mask, few kernels take grouped heads
        key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                          enable_gqa=key.shape[1] != heads)


# ---- towers ----

def pieces(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None,
           max_length_q=None, **_):
    """(attention's output [1, T, H, D], None) of concatenated pieces, each of which sees itself only.

    query, key, value [1, H, T, D]; cu_seq_lens_q [N+1]: 0, then where each piece ends.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if has_flash(query):
        flat = (x[0].transpose(0, 1) for x in (query, key, value))                       # [T, H, D]
        ends, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
        return flash(*flat, ends, longest, scaling, False)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts, found = [x.split(lengths, dim=2) for x in (query, key, value)], {}
    for length in sorted({*lengths}):
        alike = [number for number, own in enumerate(lengths) if own == length]
        together = (torch.cat([part[number] for number in alike]) for part in parts)     # [N, H, length, D]
        found |= zip(alike, squares(*together, None, scaling))
    return torch.cat([found[number] for number in range(len(lengths))], dim=1).transpose(0, 1)[None], None


# ---- one kernel for all lengths ----

def has_flash(query: torch.Tensor) -> bool:
    """Whether torch's flash attention takes this query: its device, dtype and head size."""
    return (query.dtype in HALF and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
            and flash_is_on(query.device))


def flash_is_on(device: torch.device) -> bool:
    """Whether a device has torch's flash attention kernel: CUDA from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash(query, key, value, ends: torch.Tensor, longest: int, scaling: float, causal: bool) -> torch.Tensor:
    """Attention's output [T, H, D] of concatenated samples, by torch's one kernel for all lengths.

    query [T, H, D], key and value [T, G, D]; ends [N+1], int32: 0, then where each sample ends; longest: the
    most tokens of a sample. Source: FlashAttention-2 (arXiv 2307.08691).
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, longest, longest, 0.0, causal, False, scale=scaling)[0]

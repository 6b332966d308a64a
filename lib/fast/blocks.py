"""blocks: attention on a CPU, some query rows at a time, and only the columns of the scores that these see.

torch's fused kernel for CPUs reaches a quarter of the machine's matrix multiplication rate; plain matrix
products reach most of it. Under a causal mask the blocks are half of the square of scores, under a window
less.
"""
import torch

ROWS_MASKED = 128                         # rows of a block under a mask: more rows would see more columns
ROWS_UNMASKED = 640                       # rows of a block without a mask
MOST_SCORES = 2**24                       # scores in a block, 32 MiB in bfloat16: longer rows, smaller blocks
FEWEST_ROWS = 32                          # rows that a block has even where it then exceeds MOST_SCORES
KEEP_TOKENS = 640                         # up to this length, probabilities are kept for the backward


def are_here(query: torch.Tensor) -> bool:
    """Whether a query is on a device where blocks are faster than torch's own kernel: a CPU."""
    return query.device.type == "cpu"


def attend(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Attention's output [B, H, T, E] of query [B, H, T, D], key [B, G, T, D], value [B, G, T, E].

    mask: bool (true is seen), or added to the scores, or None; it may have one batch entry or head for all.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query = (query.to(dtype) * scaling).reshape(batch * groups, heads // groups, tokens, width)
    key, value = (x.to(dtype).reshape(batch * groups, tokens, x.shape[-1]) for x in (key, value))
    mask = None if mask is None else mask.expand(batch, -1, tokens, tokens)
    return Blocks.apply(query, key, value, mask).view(batch, heads, tokens, -1)


class Blocks(torch.autograd.Function):
    """softmax(query key^T + mask) value, [N, R, T, E], of scaled queries [N, R, T, D], R heads for each key.

    key [N, T, D], value [N, T, E]. With P the attention probabilities and g the output's gradient,
    dP = g value^T, and the gradient of the scores is P (dP - sum(P dP)).

    Source: arXiv 1706.03762, equation 1.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out, kept = value.new_empty(*query.shape[:3], value.shape[-1]), []
        ctx.blocks = list(blocks(query, mask))
        keeps = any(ctx.needs_input_grad) and query.shape[2] <= KEEP_TOKENS
        for rows, seen in ctx.blocks:
            weights = weights_of(query, key, mask, rows, seen)
            out[:, :, rows] = torch.bmm(weights, value[:, seen]).view(out[:, :, rows].shape)
            if keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, mask, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask, *kept = ctx.saved_tensors
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
        for number, (rows, seen) in enumerate(ctx.blocks):
            weights = kept[number] if kept else weights_of(query, key, mask, rows, seen)
            q, g = (x[:, :, rows].flatten(1, 2) for x in (query, grad))
            to_value[:, seen] += torch.bmm(weights.transpose(1, 2), g)
            slopes = torch.bmm(g, turned(value, seen))
            slopes = torch.ops.aten._softmax_backward_data(slopes, weights, -1, weights.dtype)
            to_query[:, :, rows] = torch.bmm(slopes, key[:, seen]).view(to_query[:, :, rows].shape)
            to_key[:, seen] += torch.bmm(slopes.transpose(1, 2), q)
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None


def blocks(query, mask):
    """(rows, columns that any of them sees), two slices for each block of the scores."""
    tokens = query.shape[2]
    most_rows = ROWS_UNMASKED if mask is None else ROWS_MASKED
    size = max(FEWEST_ROWS, min(most_rows, MOST_SCORES // query.shape[:3].numel()))
    for start in range(0, tokens, size):
        rows, seen = slice(start, min(start + size, tokens)), slice(0, tokens)
        if mask is not None and mask.dtype == torch.bool:
            columns = mask[..., rows, :].flatten(0, -2).view(torch.uint8).amax(0).nonzero()
            seen = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        yield rows, seen


def weights_of(query, key, mask, rows: slice, seen: slice) -> torch.Tensor:
    """The attention probabilities of a block, [N, R * rows, columns]."""
    scores = torch.bmm(query[:, :, rows].flatten(1, 2), turned(key, seen))
    if mask is not None:
        own = mask[..., rows, seen]
        if own.dtype == torch.bool:
            hidden = torch.finfo(scores.dtype).min
            own = torch.zeros_like(own, dtype=scores.dtype).masked_fill_(~own, hidden)
        scores.view(mask.shape[0], -1, *own.shape[-2:]).add_(own)
    return torch.softmax(scores, -1, out=scores)


def turned(x: torch.Tensor, seen: slice) -> torch.Tensor:
    """The rows `seen` of x [N, T, D], transposed to [N, D, rows].

    They are made contiguous first, or each matrix product would make its own transposed copy of a strided x.
    """
    return x[:, seen].contiguous().transpose(1, 2)

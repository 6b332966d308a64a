"""collator: batches from encoded samples, for every family by three rules about shapes.

1. What goes along the tokens, [1, T] or [4, 1, T], is padded on the right: input_ids with pad_id, labels with
   IGNORE_INDEX, others with 0. Several rows, and packed ones, are padded to a MULTIPLE: their scores then lie
   in memory as kernels like them, and memory of fewer sizes is used again.
2. Media of a "cat" family are joined along their first axis; other axes are zero-padded to the largest.
   Of a "line" family all patches lie in one line, [1, …, L], and lines are joined along their last axis.
3. Media of a "stack" family, [1, tiles, …], are zero-padded on every axis, one entry per row; a row without
   media gets an all-zero entry, which these families' models drop. A mask beside the tokens, [1, T, …], is as
   long as they are.

Fork me to: batch a new kind of tensor (a fourth rule here, its name in the family's record).
"""
import torch
import torch.nn.functional as F

IGNORE_INDEX = -100                       # a label that torch's cross-entropy skips
MULTIPLE = 8                              # of tokens
PER_TOKEN = ("input_ids", "attention_mask", "labels", "position_ids")     # and all token_type_ids


def collate(rows: list[dict[str, torch.Tensor]], pad_id: int, style: str = "cat") -> dict[str, torch.Tensor]:
    """One batch {name: tensor} of encoded samples; what goes along the tokens is [B, T]."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    tokens = padded_length(lengths, packed="attention_mask" not in rows[0])
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX}
    batch = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        present = [row[key] for row in rows if key in row]
        nothing = present[0][..., :1] * 0
        if is_per_token(key):
            batch[key] = torch.cat([F.pad(t, (0, tokens - t.shape[-1]), value=fill.get(key, 0))
                                    for t in (row.get(key, nothing) for row in rows)], dim=-2)  # [B, T]
        elif style == "stack":
            along = all(goes_along(key, row[key], length, style)
                        for row, length in zip(rows, lengths) if key in row)
            batch[key] = cat_padded([row.get(key, nothing) for row in rows], tokens if along else 0)
        else:
            batch[key] = end_to_end(present, style)                                            # [I or P, …]
    return batch


def end_to_end(tensors: list[torch.Tensor], style: str) -> torch.Tensor:
    """The media of several rows as those of one: lines of patches become a longer line."""
    is_line = style == "line" and tensors[0].dim() > 2
    return torch.cat(tensors, dim=-1) if is_line else cat_padded(tensors)


def is_per_token(key: str) -> bool:
    """Whether a tensor of this name goes along the tokens."""
    return key in PER_TOKEN or key.endswith("token_type_ids")


def goes_along(key: str, tensor: torch.Tensor, tokens: int, style: str) -> bool:
    """Whether a sample's tensor goes along its tokens, as mllama's cross_attention_mask does."""
    return is_per_token(key) or style == "stack" and tensor.shape[1] == tokens


def padded_length(lengths: list[int], packed: bool) -> int:
    """Tokens that each row of a batch has, with its padding; a sample alone in its batch has none."""
    return max(lengths) + (-max(lengths) % MULTIPLE if packed or len(lengths) > 1 else 0)


def cat_padded(tensors: list[torch.Tensor], least: int = 0) -> torch.Tensor:
    """The tensors joined along axis 0, their other axes zero-padded at the end to the largest.

    least: of the first of those axes, at least so many.
    """
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
    largest[:1] = [max(size, least) for size in largest[:1]]
    padded = []
    for t in tensors:
        room = [(0, target - size) for size, target in zip(t.shape[1:], largest)]
        padded.append(F.pad(t, [side for sides in reversed(room) for side in sides]))    # the last axis first
    return torch.cat(padded)

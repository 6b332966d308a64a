"""collator: batches from encoded samples, for every family by three rules about shapes.

1. Tensors with one entry per token, [1, T] or [4, 1, T], are padded on the right: input_ids with pad_id,
   labels with IGNORE_INDEX, others with 0. Batches of several rows, and packed rows, are padded to a multiple
   of MULTIPLE: kernels are faster on aligned scores, and tensors of few sizes reuse one another's memory.
2. Media of a "cat" family are concatenated along their first axis; other axes are zero-padded to the largest.
   In a "line" family all patches lie in one line, [1, …, L]; lines are concatenated along their last axis.
3. Media of a "stack" family, [1, tiles, …], are zero-padded on every axis, one entry per row; a row without
   media gets an all-zero entry, which these families' models drop. A mask with an entry per token,
   [1, T, …], is padded to the batch's tokens.

Fork me to: batch a new kind of tensor (a fourth rule here, its name in the family's record).
"""
import torch
import torch.nn.functional as F

IGNORE_INDEX = -100                       # a label that torch's cross-entropy skips
MULTIPLE = 8                              # of tokens
PER_TOKEN = ("input_ids", "attention_mask", "labels", "position_ids")     # and all token_type_ids


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions [N] in the flattened [B*T] hidden states, targets [N]); hidden state t predicts token t+1.

    It runs on the CPU, when a batch is made: on a GPU, the host would have to wait for the result.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


def collate(rows: list[dict[str, torch.Tensor]], pad_id: int, style: str = "cat") -> dict[str, torch.Tensor]:
    """One batch {name: tensor} of encoded samples; tensors with one entry per token are [B, T]."""
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
    """The media tensors of several rows as those of one row: concatenated, lines of patches to a longer line.
    """
    is_line = style == "line" and tensors[0].dim() > 2
    return torch.cat(tensors, dim=-1) if is_line else cat_padded(tensors)


def is_per_token(key: str) -> bool:
    """Whether a tensor of this name has one entry per token."""
    return key in PER_TOKEN or key.endswith("token_type_ids")


def goes_along(key: str, tensor: torch.Tensor, tokens: int, style: str) -> bool:
    """Whether a sample's tensor has one entry per token, by its name or its shape.

    mllama's cross_attention_mask, [1, T, …], is told by its shape.
    """
    return is_per_token(key) or style == "stack" and tensor.shape[1] == tokens


def padded_length(lengths: list[int], packed: bool) -> int:
    """Tokens of each row of a batch, padding included; a sample that is alone in its batch isn't padded."""
    return max(lengths) + (-max(lengths) % MULTIPLE if packed or len(lengths) > 1 else 0)


def cat_padded(tensors: list[torch.Tensor], least: int = 0) -> torch.Tensor:
    """The tensors joined along axis 0, their other axes zero-padded at the end to the largest.

    least: the smallest size of axis 1.
    """
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
    largest[:1] = [max(size, least) for size in largest[:1]]
    padded = []
    for t in tensors:
        room = [(0, target - size) for size, target in zip(t.shape[1:], largest)]
        padded.append(F.pad(t, [side for sides in reversed(room) for side in sides]))    # the last axis first
    return torch.cat(padded)

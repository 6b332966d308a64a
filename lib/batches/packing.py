"""packing: several samples in one row, none of which sees another: each is computed as if alone.

Batches of short samples are mostly padding, and single ones leave a GPU idle. A packed row is samples one
after the other. Position ids start again at each of them, and without an attention mask transformers takes
every such start for a border (masking_utils.find_packed_sequence_indices). Where the tokens of a family's
pictures see one another in both directions, the mask is made here.

Fork me to: pack another way (`fill`).
"""
import bisect
import inspect
from collections import defaultdict
from dataclasses import dataclass

import torch

from lib.collator import IGNORE_INDEX, cat_padded, end_to_end, is_per_token
from lib.fast import features
from lib.registry import Family
from lib.run.errors import StageError


def fill(order: list[int], lengths: list[int], room: int) -> list[tuple[int, ...]]:
    """The samples of `order` in rows of at most `room` tokens, by best-fit decreasing.

    Longest first, each sample goes to the fullest row that still has room for it; one longer than `room` is
    alone in its row. The number of rows depends on the lengths only, not on the order.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = defaultdict(list)  # free tokens -> rows that have as many
    spaces: list[int] = []                              # its keys, ascending
    for index in sorted(order, key=lambda i: -lengths[i]):
        found = bisect.bisect_left(spaces, lengths[index])
        if found == len(spaces):
            rows.append([])
            space, row = room, len(rows) - 1
        else:
            space = spaces[found]
            row = by_space[space].pop()
            if not by_space[space]:
                del spaces[found]
        rows[row].append(index)
        left = space - lengths[index]
        if left > 0 and not by_space[left]:
            bisect.insort(spaces, left)
        by_space[left].append(row)
    return [tuple(row) for row in rows]


def mixed(rows: list[tuple[int, ...]], lengths: list[int], room: int, generator: torch.Generator
          ) -> list[tuple[int, ...]]:
    """The rows, after samples have swapped places at random with ones of another length, where both rows fit.

    `fill` alone puts samples of one length together. They are often alike in other ways, too, such as in
    their question, so a step of them alone would be no fair share of the data.
    """
    rows = [list(row) for row in rows]
    free = [room - sum(lengths[index] for index in row) for row in rows]
    places = [(row, place) for row, samples in enumerate(rows) for place in range(len(samples))]
    chosen = torch.randint(max(1, len(places)), (len(places),), generator=generator).tolist()
    for (row, place), (other, its_place) in zip(places, (places[number] for number in chosen)):
        more = lengths[rows[other][its_place]] - lengths[rows[row][place]]
        if more and -free[other] <= more <= free[row]:
            rows[row][place], rows[other][its_place] = rows[other][its_place], rows[row][place]
            free[row] -= more
            free[other] += more
    return [tuple(row) for row in rows]


@dataclass(frozen=True)
class Positions:
    """The position ids of a sample, as its model counts them; plain data, so that workers can be sent it.

    cls, config: the inner model's class and configuration if it gives pictures positions of their own
    (`get_rope_index`: time, height and width), else None.
    """
    cls: type | None
    config: object

    @classmethod
    def of(cls, model) -> "Positions":
        """The Positions that a loaded model needs."""
        found = next((m for m in model.modules() if hasattr(type(m), "get_rope_index")), None)
        return cls(type(found), found.config) if found is not None else cls(None, None)

    def __call__(self, row: dict[str, torch.Tensor]) -> torch.Tensor:
        """The position ids of an encoded sample: [1, T], or [4, 1, T] with number, time, height and width."""
        tokens = row["input_ids"].shape[1]
        plain = torch.arange(tokens)[None]                                       # [1, T]
        if self.cls is None:
            return plain
        if not any(key.endswith("grid_thw") for key in row):
            return plain.expand(4, 1, tokens)
        shell = self.cls.__new__(self.cls)      # the method wants a configuration and no weight
        torch.nn.Module.__init__(shell)
        shell.config = self.config
        wanted = inspect.signature(self.cls.get_rope_index).parameters.keys() - {"attention_mask"}
        rope, _ = shell.get_rope_index(**{key: row[key] for key in wanted & row.keys()})
        return torch.cat([plain[None], rope])                                    # [4, 1, T]


def join(rows: list[dict[str, torch.Tensor]], positions: Positions, style: str) -> dict[str, torch.Tensor]:
    """One packed row of several encoded samples: tokens and media concatenated, position ids for each sample.

    It has no attention_mask, since transformers looks for borders only without one. Its "packed" is a list,
    the number of tokens of each sample.
    """
    lengths = [row["input_ids"].shape[1] for row in rows]
    joined = {"packed": lengths, "position_ids": torch.cat([positions(row) for row in rows], dim=-1)}
    for key in dict.fromkeys(key for row in rows for key in row if key != "attention_mask"):
        if key == "features":
            joined[key] = features.together([row[key] for row in rows if key in row])
        elif is_per_token(key):
            zeros = (torch.zeros_like(row["input_ids"]) for row in rows)
            joined[key] = torch.cat([row.get(key, zero) for row, zero in zip(rows, zeros)], dim=1)  # [1, T]
        elif style == "stack":
            tiles = [row[key].flatten(0, 1) for row in rows if key in row]   # several clips: [2, tiles, …]
            joined[key] = cat_padded(tiles)[None]                                # [1, tiles, …]
        else:
            joined[key] = end_to_end([row[key] for row in rows if key in row], style)
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    joined["labels"][:, first] = IGNORE_INDEX           # no sample predicts the next one's first token
    return joined


@dataclass(frozen=True)
class BlockMasks:
    """The attention masks of packed rows, for families where a picture's tokens see one another both ways.

    blocks: {kind of layer: whether they do so there}. window: tokens that a sliding layer sees.
    """
    blocks: dict[str, bool]
    window: int

    @classmethod
    def of(cls, model, kinds: tuple[str, ...]) -> "BlockMasks | None":
        """The BlockMasks that a loaded model needs; None where position ids suffice.

        kinds: the family's block_masks, those kinds of layer in which pictures see all of themselves.
        """
        text = model.config.get_text_config()
        # Gemma-4's small models have None here, and plain causal masks.
        if not kinds or getattr(text, "use_bidirectional_attention", False) is None:
            return None
        return cls({kind: kind in kinds for kind in sorted({*text.layer_types})}, text.sliding_window)

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{kind of layer: mask, bool [B, 1, T, T]}, true where a query (third axis) sees a key (fourth)."""
        position = batch["position_ids"]                                         # [B, T]
        kinds = next(batch[key] for key in ("token_type_ids", "mm_token_type_ids") if key in batch)
        sample = (position == 0).cumsum(-1)
        picture = (kinds == 1) | (kinds == 2)
        starts = picture & ~torch.nn.functional.pad(picture, (1, 0))[:, :-1]
        block = torch.where(picture, starts.cumsum(-1), 0)
        query, key = (slice(None), slice(None), None), (slice(None), None)
        same_sample = sample[query] == sample[key]                               # [B, T, T]
        causal = position[query] >= position[key]
        same_block = (block[query] == block[key]) & picture[query]
        near = position[query] - position[key] < self.window
        masks = {}
        for kind, both_ways in self.blocks.items():
            sees = (causal | same_block if both_ways else causal) & same_sample
            masks[kind] = (sees & near if kind == "sliding_attention" else sees)[:, None]
        return masks


def needs(model, family: Family) -> dict:
    """{positions, masks}, which Samples (lib/batches/sampler.py) need to pack for a model.

    Raises StageError where the family's record, or flex_attention, refuses packing.
    """
    if family.packing:
        raise StageError(f"sample_packing: {family.name} can't be packed: {family.packing}",
                         "sample_packing: false, and group_by_length: true against padding")
    masks = BlockMasks.of(model, family.block_masks)
    if masks and model.config.get_text_config()._attn_implementation == "flex_attention":
        raise StageError(f"sample_packing: {family.name}'s packed rows need masks that flex_attention can't "
                         "take", "attn_implementation: sdpa, or sample_packing: false")
    return {"positions": Positions.of(model), "masks": masks}

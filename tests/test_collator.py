"""A batch computes what its rows compute alone, whatever rows it mixes and in whatever order."""

import functools
from itertools import permutations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from lib import registry
from lib.collator import IGNORE_INDEX, cat_padded, collate, supervised_positions
from lib.data.messages import text_parts
from lib.text.chat import Encoder
from lib.text.processor import load_processor
from lib.text.template import Template

NAMES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm2")
KINDS = {"text": [], "one picture": [(48, 40)], "two pictures": [(64, 32), (32, 80)]}
MIXES = [*permutations(KINDS), *permutations(KINDS, 2), ("two pictures",) * 2, ("text",) * 2]


class Rows:
    """A family's model with a row of each kind, encoded, and the logits that each has alone."""

    def __init__(self, name: str, folder):
        processor = load_processor(folder)
        self.encoder = Encoder.of(processor, registry.family_of("smolvlm" if name == "smolvlm2" else name))
        self.model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
        template = Template(processor)
        self.rows, self.alone = {}, {}
        for kind, sizes in KINDS.items():
            images = [Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes]
            content = [{"type": "image"}] * len(images) + text_parts(f"What is {kind}?")
            reply = {"role": "assistant", "content": text_parts(kind)}
            (conversation,) = template.conversations([{"role": "user", "content": content}, reply])
            self.rows[kind] = self.encoder.encode(conversation.text, conversation.spans, images)
            self.alone[kind] = self.logits(self.rows[kind])

    @torch.inference_mode()
    def logits(self, batch: dict) -> torch.Tensor:
        """[B, T, V]"""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return self.model(**inputs, use_cache=False).logits


@pytest.fixture(scope="module")
def rows_of(zoo):
    return functools.cache(lambda name: Rows(name, zoo(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_logits_that_its_rows_have_alone(name, rows_of):
    family = rows_of(name)
    for mix in MIXES:
        batch = collate([family.rows[kind] for kind in mix], family.encoder.pad_id, family.encoder.collate)
        for kind, row in zip(mix, family.logits(batch)):
            alone = family.alone[kind][0]
            assert (row[:len(alone)] - alone).abs().max() <= 1e-5 * alone.abs().max(), f"{kind} in {mix}"


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_masked_and_not_trained(name, rows_of):
    family = rows_of(name)
    batch = collate(list(family.rows.values()), family.encoder.pad_id, family.encoder.collate)
    columns = (batch[key] for key in ("attention_mask", "input_ids", "labels"))
    for row, mask, ids, labels in zip(family.rows.values(), *columns):
        tokens = row["input_ids"].shape[1]
        assert mask[:tokens].all() and not mask[tokens:].any()
        assert (ids[tokens:] == family.encoder.pad_id).all() and (labels[tokens:] == IGNORE_INDEX).all()


def test_each_trained_token_is_predicted_by_the_position_before_it_and_token_0_is_one_as_any():
    labels = torch.tensor([[IGNORE_INDEX, 0, 7], [8, IGNORE_INDEX, 9]])   # no position predicts a first token
    positions, targets = supervised_positions(labels)
    assert positions.tolist() == [0, 1, 4] and targets.tolist() == [0, 7, 9]


def test_a_key_along_the_tokens_that_some_rows_lack_is_zero_there():
    ids = torch.tensor([[5, 6, 7]])
    typed = {"input_ids": ids[:, :2], "token_type_ids": torch.tensor([[0, 1]])}
    batch = collate([{"input_ids": ids}, typed], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [9] * 5, [5, 6] + [9] * 6]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0, 1] + [0] * 6]


def test_several_rows_and_packed_ones_are_padded_to_a_multiple_of_eight():
    def columns(*lengths: int, packed: bool = False) -> int:
        keys = ("input_ids",) if packed else ("input_ids", "attention_mask")
        rows = [dict.fromkeys(keys, torch.ones(1, length, dtype=torch.long)) for length in lengths]
        return collate(rows, pad_id=9)["input_ids"].shape[1]
    assert columns(9) == 9                              # alone: it needs no mask
    assert columns(9, 4) == columns(9, 9) == columns(9, packed=True) == 16
    assert columns(8, 16) == columns(16, packed=True) == 16


def test_a_mask_beside_the_tokens_is_padded_with_them():
    rows = [{"input_ids": torch.ones(1, tokens, dtype=torch.long),
             "cross_attention_mask": torch.ones(1, tokens, 1, 2)} for tokens in (3, 5)]
    mask = collate(rows, pad_id=9, style="stack")["cross_attention_mask"]                # [2, 8, 1, 2]
    assert mask.shape == (2, 8, 1, 2) and mask.sum(dim=(1, 2, 3)).tolist() == [6, 10]


def test_a_row_without_media_has_an_all_zero_entry_in_a_stack():
    ids = torch.tensor([[5]])
    rows = [{"input_ids": ids}, {"input_ids": ids, "pixel_values": torch.ones(1, 2, 3, 4, 4)}]
    batch = collate(rows, pad_id=9, style="stack")
    assert batch["pixel_values"].shape == (2, 2, 3, 4, 4)
    assert not batch["pixel_values"][0].any() and batch["pixel_values"][1].all()


def test_pictures_of_several_sizes_are_padded_at_the_bottom_and_right():
    small, large = torch.ones(2, 3, 2, 2), torch.ones(1, 3, 4, 3)
    joined = cat_padded([small, large])
    assert joined.shape == (3, 3, 4, 3)
    assert joined[0].sum() == 3 * 2 * 2 and joined[0, :, :2, :2].all() and joined[2].all()

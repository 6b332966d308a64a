"""processing: a text and its media through a checkpoint's processor, and what that writes into the text.

Processors say what they write in different ways, or not at all: here it always is `replaced`, as spans.py
reads it. Where that doesn't tell all, the row is refused, since labels would shift.
"""
import re

import torch

from lib.run.errors import StageError
from lib.text import prefix
from lib.text.processor import (
    adds_first_token, media_arguments, placeholders, special_tokens, tokenizer_of)
from lib.text.spans import read_off


def process(processor, text: str, given: dict[str, list], has_prefix: bool, seam: int | None
            ) -> tuple[dict, list[dict]]:
    """(the processor's tensors, what it wrote for each placeholder, as lib/text/spans.py reads it).

    given: {kind: decoded media}. seam: where the reply begins, if the processor takes it apart (has_prefix).
    Floating-point tensors are made float32; a processor may return another dtype, whatever the model.
    """
    options = {"return_tensors": "pt", "return_offsets_mapping": True,
               "add_special_tokens": adds_first_token(processor, text)}
    if processor is tokenizer_of(processor):
        batch = dict(processor([text], **options))
    else:
        if "mm_token_type_ids" in getattr(processor, "model_input_names", ()):
            options["return_mm_token_type_ids"] = True
        options |= {"padding_side": "right", "return_text_replacement_offsets": True}
        options |= media_arguments(given)
        if has_prefix:
            batch = prefix.process(processor, text, seam, **options)
        else:
            batch = dict(processor(text=[text], **options))
    replaced = batch.pop("text_replacement_offsets", None)
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise StageError(f"base_model: its {type(processor).__name__} makes {key} a "
                             f"{type(value).__name__}", "choose another base_model: batches hold tensors")
        if value.is_floating_point():
            batch[key] = value.float()
    replaced = replaced[0] if isinstance(replaced, list) and replaced else []            # or a tensor of none
    if not replaced and any(given.values()):
        replaced = unsaid(processor, text, batch["input_ids"][0].tolist())
    return batch, replaced


def unsaid(processor, text: str, ids: list[int]) -> list[dict]:
    """What a processor wrote for each placeholder without saying so, as Idefics2's does, read off its ids.

    [] where it wrote nothing, or more than special tokens and white space.
    """
    tokenizer, first = tokenizer_of(processor), adds_first_token(processor, text)
    if tokenizer(text, add_special_tokens=first)["input_ids"] == ids:
        return []
    ids = ids[len(tokenizer("", add_special_tokens=first)["input_ids"]):]
    made = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    tokens = "|".join(map(re.escape, placeholders(processor).values()))
    return read_off(made, text, tokens, special_tokens(processor).pattern)


def refuse_unplaced(processor, text: str, seam: int, ids: list[int]) -> None:
    """Raise StageError where a processor tokenized another text than it says: labels would shift.

    text: with what it says that it wrote; seam: where the reply begins in it, if it was tokenized apart.
    """
    first, reply = adds_first_token(processor, text), text[seam:] or None
    if tokenizer_of(processor)(text[:seam], reply, add_special_tokens=first)["input_ids"] != ids:
        name = type(processor).__name__
        raise StageError(f"base_model: its {name} writes more into the text than it says, or elsewhere",
                         "choose another base_model: labels would be misplaced")

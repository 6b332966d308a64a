"""evaluate: loss on held-out samples, greedy answers, and how much of them is right.

Fork me to: count something else as right (`METRICS`).
"""
from collections.abc import Iterable

import torch

from lib.chat import Encoder
from lib.loss import forward_loss
from lib.parallel import World
from lib.processor import tokenizer_of
from lib.sampler import to_device


@torch.no_grad()
def held_out_loss(model, batches: Iterable[dict], world: World, autocast) -> dict[str, float]:
    """{loss per supervised token, token accuracy} over the batches of all ranks."""
    exact = torch.float32 if world.device.type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=exact, device=world.device)
    model.eval()
    for batch in batches:
        tokens = len(batch["targets"])
        with autocast():
            loss, right = forward_loss(model, to_device(batch, world.device))
        totals += torch.stack([loss.to(totals), right.to(totals), totals.new_tensor(tokens)])
    model.train()
    loss, right, tokens = world.sum(totals).tolist()
    return {"eval_loss": loss / tokens, "eval_token_accuracy": right / tokens}


@torch.no_grad()
def generate(model, encoder: Encoder, text: str, media: list, max_new_tokens: int) -> str:
    """The model's greedy answer to a rendered prompt and its media, without special tokens."""
    batch = encoder.encode(text, [], media)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    tokenizer = tokenizer_of(encoder.processor)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                            pad_token_id=encoder.pad_id, eos_token_id=stops(model, tokenizer))
    new = output[0, inputs["input_ids"].shape[1]:]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def stops(model, tokenizer) -> list[int]:
    """The tokens that end an answer: the checkpoint's, and the tokenizer's eos, which a recipe may name."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({*own, tokenizer.eos_token_id} - {None})


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that equal their reference, blanks around them aside."""
    right = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return right / max(1, len(references))


def contains(answers: list[str], references: list[str]) -> float:
    """The share of answers in which their reference occurs, whatever the case."""
    right = sum(r.strip().lower() in a.lower() for a, r in zip(answers, references, strict=True))
    return right / max(1, len(references))


def anls(answers: list[str], references: list[str]) -> float:
    """The mean likeness of answer and reference, whatever the case; at half alike or less it counts 0.

    Source: average normalised Levenshtein similarity (arXiv 1905.13648, section 4.2).
    """
    pairs = [(a.strip().lower(), r.strip().lower()) for a, r in zip(answers, references, strict=True)]
    alike = [1 - edits(a, r) / max(1, len(a), len(r)) for a, r in pairs]
    return sum(each for each in alike if each > 0.5) / max(1, len(references))


def edits(one: str, other: str) -> int:
    """How many characters must be added, removed or replaced to make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, start=1):
        above, row[0] = row[0], number
        for place, right in enumerate(other, start=1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (left != right))
    return row[-1]


METRICS = {"exact_match": exact_match, "contains": contains, "anls": anls}

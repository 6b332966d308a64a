"""evaluate: loss on held-out samples, greedy answers, exact match."""
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
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                            pad_token_id=encoder.pad_id)
    new = output[0, inputs["input_ids"].shape[1]:]
    return tokenizer_of(encoder.processor).decode(new, skip_special_tokens=True).strip()


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that equal their reference, blanks around them aside."""
    right = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return right / max(1, len(references))

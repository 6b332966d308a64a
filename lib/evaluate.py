"""evaluate: loss on held-out samples, greedy answers, exact match."""
import torch

from lib.chat import Encoder, tokenizer_of
from lib.loss import forward_loss
from lib.parallel import World
from lib.sampler import Samples, loader, to_device


@torch.no_grad()
def held_out_loss(model, samples: Samples, world: World, micro_batch_size: int, autocast) -> dict[str, float]:
    """{loss per supervised token, token accuracy} over all held-out samples, shared out over the ranks."""
    mine = list(range(len(samples)))[world.rank::world.world_size]
    batches = [mine[i:i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]
    totals = torch.zeros(3, dtype=torch.float64)
    model.eval()
    for batch in loader(samples, batches, 0, world.device):
        with autocast():
            loss, correct = forward_loss(model, to_device(batch, world.device))
        totals += torch.tensor([float(loss), float(correct), len(batch["targets"])], dtype=torch.float64)
    model.train()
    loss, correct, tokens = world.sum(totals.to(world.device, torch.float32 if world.device.type == "mps" else None))
    return {"eval_loss": float(loss / tokens), "eval_token_accuracy": float(correct / tokens)}


@torch.no_grad()
def generate(model, encoder: Encoder, text: str, images: list, max_new_tokens: int) -> str:
    """The model's greedy answer to a rendered prompt and its pictures, without special tokens."""
    batch = encoder.encode(text, [], images)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                            pad_token_id=encoder.pad_id)
    new = output[0, inputs["input_ids"].shape[1]:]
    return tokenizer_of(encoder.processor).decode(new, skip_special_tokens=True).strip()


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that equal their reference, blanks around them aside."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / max(1, len(references))

"""evaluate: loss on held-out samples, and greedy answers.

Fork me to: answer otherwise than greedily (`generate`).
"""
import math
from collections.abc import Iterable

import torch

from lib import fast
from lib.batches.sampler import to_device
from lib.models.plan import quiet
from lib.text.chat import Encoder
from lib.text.processor import tokenizer_of


@torch.no_grad()
def held_out_loss(run, batches: Iterable[tuple[str, dict]]) -> dict[str, float]:
    """{"eval_loss": per supervised token, "eval_token_accuracy"} over the batches of all ranks.

    batches: (name of the data set, batch); where there are several data sets, the loss of each is added.
    """
    world, names = run.world, list(run.held_out.by_dataset())
    exact = torch.float32 if world.device.type == "mps" else torch.float64
    totals = torch.zeros(len(names), 3, dtype=exact, device=world.device)
    run.model.eval()
    for name, batch in batches:
        tokens = len(batch["targets"])
        with run.autocast():
            loss, right = run.loss(run.model, to_device(batch, world.device))
        batch_totals = loss.to(totals), right.to(totals), totals.new_tensor(tokens)
        totals[names.index(name)] += torch.stack(batch_totals)
    run.model.train()
    of_each = world.sum(totals)
    loss, right, tokens = of_each.sum(0).tolist()
    figures = {"eval_loss": loss / tokens, "eval_token_accuracy": right / tokens}
    if len(names) > 1:
        pairs = zip(names, of_each.tolist())
        figures |= {f"eval_{name}_loss": loss / tokens for name, (loss, _, tokens) in pairs}
    return figures


@torch.no_grad()
def held_out_answers(run) -> list[dict]:
    """[{sample_id, answer, reference}] of `eval_answer_rows` held-out samples, always the same ones.

    The samples are evenly spread. Ranks share the work, and every rank returns all answers. A sharded model
    needs as many forwards on every rank.
    """
    samples, world = run.held_out, run.world
    count = min(len(samples), run.work.config.eval_answer_rows)
    chosen = [place * len(samples) // count for place in range(count)]
    mine = chosen[world.rank::world.world_size]
    if samples.even:
        mine += chosen[:math.ceil(count / world.world_size) - len(mine)]
    fast.of_batch({})
    run.model.eval()
    answers = []
    for index in mine:
        record = samples.records[index]
        text, shown, reference = samples.encoder.prompt(record)
        encoder = samples.encoder.bounded(record["image_bounds"])
        with quiet(), run.autocast():
            answer = generate(run.model, encoder, text, shown, run.work.config.eval_max_new_tokens,
                              together=samples.even)
        answers.append({"sample_id": samples.ids[index], "answer": answer, "reference": reference})
    run.model.train()
    shares = world.everyones(answers)
    return [shares[place % world.world_size][place // world.world_size] for place in range(count)]


@torch.no_grad()
def generate(model, encoder: Encoder, text: str, media: list, max_new_tokens: int, together=False) -> str:
    """The model's greedy answer to a rendered prompt and its media, without special tokens.

    together: run as many forwards as the rank with the longest answer, which a sharded model needs.
    """
    batch = encoder.encode(text, [], media)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    tokenizer = tokenizer_of(encoder.processor)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                            pad_token_id=encoder.pad_id, eos_token_id=stops(model, tokenizer),
                            synced_gpus=together)
    new = output[0, inputs["input_ids"].shape[1]:]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def stops(model, tokenizer) -> list[int]:
    """The ids that end an answer: the checkpoint's, and the tokenizer's eos, which a recipe may change."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({*own, tokenizer.eos_token_id} - {None})

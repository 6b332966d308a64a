"""evaluate: loss on held-out samples, greedy answers, and how much of them is right.

Fork me to: count something else as right (`METRICS`, or a function of yours in `eval_metrics`).
"""
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from lib import fast
from lib.batches.sampler import to_device
from lib.models.plan import quiet
from lib.text.chat import Encoder
from lib.text.processor import tokenizer_of
from lib.training import hooks


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


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that equal their reference, ignoring blanks around them."""
    right = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return right / max(1, len(references))


def contains(answers: list[str], references: list[str]) -> float:
    """The share of answers that contain their reference, ignoring case."""
    right = sum(r.strip().lower() in a.lower() for a, r in zip(answers, references, strict=True))
    return right / max(1, len(references))


def anls(answers: list[str], references: list[str]) -> float:
    """The mean similarity of answer and reference, ignoring case; a similarity of a half or less counts as 0.

    Source: average normalised Levenshtein similarity (arXiv 1905.13648, section 4.2).
    """
    pairs = [(a.strip().lower(), r.strip().lower()) for a, r in zip(answers, references, strict=True)]
    alike = [1 - edits(a, r) / max(1, len(a), len(r)) for a, r in pairs]
    return sum(each for each in alike if each > 0.5) / max(1, len(references))


def edits(one: str, other: str) -> int:
    """The Levenshtein distance of two texts: characters to add, remove or replace to make them equal."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, start=1):
        above, row[0] = row[0], number
        for place, right in enumerate(other, start=1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (left != right))
    return row[-1]


def json_f1(answers: list[str], references: list[str]) -> float:
    """The F1 of fields: how far answers' and references' (path, value) pairs agree, counted over all rows.

    An answer's JSON may stand among words or in a code fence; an answer without JSON has no field.
    Source: the field-level F1 of Donut (arXiv 2111.15664, section 3.1).
    """
    same = every = 0
    for answer, reference in zip(answers, references, strict=True):
        given, wanted = Counter(fields_of(answer)), Counter(fields_of(reference))
        same, every = same + (given & wanted).total(), every + given.total() + wanted.total()
    return 2 * same / max(1, every)


def fields_of(text: str) -> list[tuple[str, str]]:
    """(path, value) of each field of the JSON in a text; positions in lists are no part of a path."""
    def fields(path: str, value) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [field for key, inner in value.items() for field in fields(f"{path}.{key}", inner)]
        if isinstance(value, list):
            return [field for inner in value for field in fields(f"{path}[]", inner)]
        return [(path, str(value).strip())]
    found = re.search(r"[{\[].*[}\]]", text, re.DOTALL)
    try:
        return fields("", json.loads(found[0])) if found else []
    except (ValueError, RecursionError):
        return []


METRICS = {"exact_match": exact_match, "contains": contains, "anls": anls, "json_f1": json_f1}


def metrics_of(named: list[str]) -> dict[str, Callable]:
    """{name: function} of the recipe's `eval_metrics`: those in METRICS, or a user's own."""
    return {text.rpartition(":")[2]: METRICS[text] if text in METRICS else hooked_metric(text)
            for text in named}


def hooked_metric(text: str) -> Callable:
    """A user's metric, which raises StageError where the user's function returns no finite number."""
    score = hooks.function("eval_metrics", text)

    def metric(answers: list[str], references: list[str]) -> float:
        found = score(answers, references)
        if not (isinstance(found, (int, float)) and math.isfinite(found)):
            raise hooks.wrong("eval_metrics", text, found, "a number")
        return float(found)
    return metric

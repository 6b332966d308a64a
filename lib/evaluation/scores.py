"""scores: how much of the answers is right: a number from 0 to 1 for answers and their references.

Fork me to: count something else as right (`METRICS`, or a function of yours in `eval_metrics`).
"""
import json
import math
import re
from collections import Counter
from collections.abc import Callable

from lib.training import hooks


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

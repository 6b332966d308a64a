"""summary: what the rows came to, in numbers: report.json, and tables of the terminal and of pages."""
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lib import terminal
from lib.messages import shortened

MOST_WORDS = 20                           # more kinds than these are no template's, they vary with the rows
SUMS = ("input_tokens", "media_tokens", "supervised_tokens")
DATASET_COLUMNS = ["data set", "samples", "held out", "rejected", "tokens", "media", "trained", "longest"]


def write_report(path: Path, train: list[dict], held_out: list[dict], rejects: list[dict]) -> dict:
    """All in numbers, written as report.json: counts, data sets, kinds of rejects, the template's words."""
    every = train + held_out
    sums = {name: sum(sample[name] for sample in every) for name in SUMS}
    counts = {"train_samples": len(train), "held_out_samples": len(held_out), "rejected_rows": len(rejects),
              "rows_over_sequence_len": sum(reject["too_long"] for reject in rejects),
              "samples_cut_to_sequence_len": sum(sample["cut_tokens"] > 0 for sample in every),
              **sums, "tokens_per_picture": tokens_per_picture(every),
              "longest_sample_tokens": max(sample["input_tokens"] for sample in every),
              "replies_ended_by_the_kit": sum(sample["ends_added"] for sample in every),
              "rows_that_tell_the_day": len({row_of(sample) for sample in every if sample["tells_day"]})}
    content = {"counts": counts, "datasets": by_dataset(train, held_out, rejects),
               "rejects": kinds_of(rejects),
               "template_says": [{"words": words, "rows": rows} for words, rows in own_words(every)]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


def tokens_per_picture(samples: list[dict]) -> int:
    """The average of those samples that have pictures and no other media, 0 where none has."""
    seen = [sample for sample in samples if {medium["kind"] for medium in sample["media"]} == {"image"}]
    pictures = sum(len(sample["media"]) for sample in seen)
    return round(sum(sample["media_tokens"] for sample in seen) / pictures) if pictures else 0


def row_of(sample: dict) -> tuple[str, int]:
    """The row that a sample was made of: several may be of one."""
    return sample["dataset"], sample["row"]


def by_dataset(train: list[dict], held_out: list[dict], rejects: list[dict]) -> dict[str, dict[str, int]]:
    """{path: {samples trained and held out, rejected rows, tokens of all kinds, the longest sample's}}."""
    paths = dict.fromkeys(each["dataset"] for part in (train, held_out, rejects) for each in part)
    parts = {name: Counter(each["dataset"] for each in part) for name, part in
             (("train_samples", train), ("held_out_samples", held_out), ("rejected_rows", rejects))}
    found = {}
    for path in paths:
        samples = [sample for sample in train + held_out if sample["dataset"] == path]
        longest = max((sample["input_tokens"] for sample in samples), default=0)
        found[path] = {**{name: numbers[path] for name, numbers in parts.items()},
                       **{name: sum(sample[name] for sample in samples) for name in SUMS},
                       "longest_sample_tokens": longest}
    return found


def dataset_rows(datasets: Iterable[tuple[str, dict]]) -> list[list]:
    """The lines of DATASET_COLUMNS for (name, numbers), and their sum where there are several."""
    rows = [[name, *numbers.values()] for name, numbers in datasets]
    if len(rows) > 1:
        *sums, longest = zip(*(numbers for _, *numbers in rows))
        rows.append(["all", *map(sum, sums), max(longest)])
    return rows


def own_words(samples: list[dict]) -> list[tuple[str, int]]:
    """[(what the chat template says by itself, in how many rows)], the most frequent first."""
    said = {(row_of(sample), words) for sample in samples for words in sample["put_in"]}
    numbers = Counter(words for _, words in said)
    return sorted(numbers.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]


def kinds_of(rejects: list[dict]) -> list[dict]:
    """[{rows, such_as, fix}], the most frequent kind first: what is mended in one way is of one kind."""
    first = {reject["fix"]: f"{reject['where']}: {reject['reason']}" for reject in reversed(rejects)}
    numbers = Counter(reject["fix"] for reject in rejects)
    return [{"rows": number, "such_as": first[fix], "fix": fix} for fix, number in numbers.most_common()]


def say(report: dict) -> None:
    """Print the counts, those by data set, and what the template says by itself: no row holds that."""
    terminal.table("02_data", ["what", "count"],
                   [[name.replace("_", " "), count] for name, count in report["counts"].items()])
    if len(report["datasets"]) > 1:
        terminal.table("by data set", DATASET_COLUMNS, dataset_rows(report["datasets"].items()))
    if said := report["template_says"]:
        terminal.table("what the chat template says by itself", ["rows", "words"],
                       [[each["rows"], shortened(each["words"])] for each in said])

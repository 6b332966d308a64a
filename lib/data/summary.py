"""summary: what the rows came to, in numbers: report.json, and tables of the terminal and of pages."""
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.samples import inner, numbered, rows_of
from lib.data.shapes import shortened
from lib.run import terminal
from lib.run.ledger import in_lines, write_json

CAPS = [2**power for power in range(6, 14)]   # values of max_image_tokens: 02 says what each would save
MOST_TOO_LONG = 0.1                       # of a data set's rows, from which on it is said aloud
MOST_WORDS = 20                           # more kinds than these are no template's, they vary with the rows
SUMS = ("input_tokens", "media_tokens", "supervised_tokens")
DATASET_COLUMNS = ["data set", "samples", "held out", "rejected", "tokens", "media", "trained", "longest"]


class Rejects:
    """What can't be used: a line of rejects.jsonl each, and here only what is said of them all.

    kinds: what is mended in one way is of one kind. first, number: by whether the row is too long.
    datasets: how many rows of each.
    """

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8")
        self.kinds: dict[str, dict] = {}
        self.first: dict[bool, dict] = {}
        self.number, self.datasets = Counter(), Counter()

    def add(self, rejects: list[dict]) -> None:
        """Write these down and count them."""
        for reject in rejects:
            self.file.write(in_lines([reject]))
            kind = {"rows": 0, "such_as": f"{reject['where']}: {reject['reason']}", "fix": reject["fix"]}
            self.kinds.setdefault(reject["fix"], kind)["rows"] += 1
            self.first.setdefault(reject["too_long"], reject)
            self.number[reject["too_long"]] += 1
            self.datasets[reject["dataset"]] += 1

    def listed(self) -> list[dict]:
        """[{rows, such_as, fix}], the most frequent kind first."""
        return sorted(self.kinds.values(), key=lambda kind: -kind["rows"])


def warn_of_length(path: str, too_long: int, rows: int) -> None:
    """Warn where many of a data set's rows are too long: the rest is no longer what the data set is."""
    if too_long > MOST_TOO_LONG * rows:
        terminal.warn(f"{path}: {too_long:,} of {rows:,} rows ({too_long / rows:.0%}) are over "
                      "sequence_len; 02_data/rejects.jsonl says what would keep each")


def write_report(path: Path, table: pa.Table, train: np.ndarray, held_out: np.ndarray,
                 rejects: Rejects) -> dict:
    """All in numbers, written as report.json: counts, data sets, kinds of rejects, the template's words."""
    every = np.concatenate([train, held_out])
    column = {name: table[name].to_numpy()[every] for name in (*SUMS, "pictures", "cut_tokens", "ends_added")}
    pictures = column["pictures"].sum()
    on_pictures = column["media_tokens"][column["pictures"] > 0].sum()
    day = rows_of(table)[every][table["tells_day"].to_numpy()[every]]
    counts = {"train_samples": len(train), "held_out_samples": len(held_out),
              "rejected_rows": rejects.number.total(), "rows_over_sequence_len": rejects.number[True],
              "samples_cut_to_sequence_len": (column["cut_tokens"] > 0).sum(),
              **{name: column[name].sum() for name in SUMS},
              "tokens_per_picture": round(on_pictures / pictures) if pictures else 0,
              "longest_sample_tokens": column["input_tokens"].max(),
              "replies_ended_by_the_kit": column["ends_added"].sum(),
              "rows_that_tell_the_day": len(np.unique(day))}
    content = {"counts": {name: int(count) for name, count in counts.items()},
               "datasets": by_dataset(table, train, held_out, rejects), "rejects": rejects.listed(),
               "template_says": [{"words": words, "rows": rows} for words, rows in own_words(table, every)]}
    write_json(path, content)
    return content


def by_dataset(table: pa.Table, train: np.ndarray, held_out: np.ndarray,
               rejects: Rejects) -> dict[str, dict[str, int]]:
    """{path: {samples trained and held out, rejected rows, tokens of all kinds, the longest sample's}}."""
    paths, names = numbered(table["dataset"]), pc.unique(table["dataset"]).to_pylist()
    present = dict.fromkeys(paths[np.concatenate([train, held_out])].tolist())
    found = {}
    for name in dict.fromkeys([*(names[path] for path in present), *rejects.datasets]):
        path = names.index(name) if name in names else -1
        own_train, own_held_out = (part[paths[part] == path] for part in (train, held_out))
        own = {column: table[column].to_numpy()[np.append(own_train, own_held_out)] for column in SUMS}
        found[name] = {"train_samples": len(own_train), "held_out_samples": len(own_held_out),
                       "rejected_rows": rejects.datasets[name],
                       **{column: int(tokens.sum()) for column, tokens in own.items()},
                       "longest_sample_tokens": int(own["input_tokens"].max(initial=0))}
    return found


def dataset_rows(datasets: Iterable[tuple[str, dict]]) -> list[list]:
    """The lines of DATASET_COLUMNS for (name, numbers), and their sum where there are several."""
    rows = [[name, *numbers.values()] for name, numbers in datasets]
    if len(rows) > 1:
        *sums, longest = zip(*(numbers for _, *numbers in rows))
        rows.append(["all", *map(sum, sums), max(longest)])
    return rows


def own_words(table: pa.Table, every: np.ndarray) -> list[tuple[str, int]]:
    """[(what the chat template says by itself, in how many rows)], the most frequent first."""
    words, said_by = inner(table["put_in"])
    said = np.isin(said_by, every)
    rows = np.unique(rows_of(table), return_inverse=True)[1]
    pairs = np.unique(numbered(words)[said] << 40 | rows[said_by[said]])
    numbers = zip(pc.unique(words).to_pylist(), np.bincount(pairs >> 40).tolist())
    return sorted((item for item in numbers if item[1]), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]


def say(report: dict) -> None:
    """Print the counts, those by data set, and what the template says by itself: no row holds that."""
    terminal.table("02_data", ["what", "count"],
                   [[name.replace("_", " "), count] for name, count in report["counts"].items()])
    if len(report["datasets"]) > 1:
        terminal.table("by data set", DATASET_COLUMNS, dataset_rows(report["datasets"].items()))
    if said := report["template_says"]:
        terminal.table("what the chat template says by itself", ["rows", "words"],
                       [[each["rows"], shortened(each["words"])] for each in said])


def say_tokens_per_picture(table: pa.Table, places: np.ndarray, resized: bool) -> None:
    """Print how many tokens pictures take, what a cap would save, and how many rows hold coordinates.

    resized: whether the recipe changes the size of all pictures. A sample with several pictures counts with
    their mean.
    """
    pictures, media_tokens = (table[name].to_numpy()[places] for name in ("pictures", "media_tokens"))
    if (shown := pictures > 0).any():
        pictures, tokens = pictures[shown], media_tokens[shown] / pictures[shown]
        fewest, most = round(tokens.min()), round(tokens.max())
        mean = np.average(tokens, weights=pictures)
        terminal.say(f"tokens per picture: {fewest} to {most}, {mean:.0f} on average")
        every = table["input_tokens"].to_numpy()[places].sum()
        saved = [(cap, round((np.maximum(0, tokens - cap) * pictures).sum())) for cap in CAPS if cap < most]
        if saved:
            terminal.table("what a cap would save", ["max_image_tokens", "tokens", "of all"],
                           [[cap, tokens, f"{tokens / every:.0%}"] for cap, tokens in saved])
    moved = table["coordinates"].to_numpy() & (resized | table["image_bounds"].is_valid().to_numpy())
    if off := len(np.unique(rows_of(table)[places][moved[places]])):
        terminal.warn(f"{terminal.counted(off, 'row')} with boxes or points, and pictures that are resized: "
                      "coordinates in pixels would be wrong, shares of a side stay right")

"""samples: the records that 02 hands on, the choice of those held out, and their files.

A sample holds no pixels and no token ids: it has its text, which characters are trained, where its media are,
and its lengths.
"""
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from lib.stage import StageError

MEDIUM = {"kind": "string", "path": "string", "bytes": "binary", "sha256": "string",
          "width": "int32", "height": "int32", "seconds": "float32"}
SAMPLE = {"sample_id": "string", "row": "int64", "dataset": "string", "messages": "string", "text": "string",
          "spans": [{"start": "int32", "end": "int32"}], "reply": {"start": "int32", "end": "int32"},
          "media": [MEDIUM],
          "image_bounds": "string", "input_tokens": "int32", "media_tokens": "int32",
          "supervised_tokens": "int32"}


def names_of(specs: list[dict]) -> list[str]:
    """A name for each data set, by which its samples are called: its file's, numbered where that is taken."""
    names: list[str] = []
    for spec in specs:
        stem = name = Path(spec["path"]).stem
        number = 2
        while name in names:
            name = f"{stem}.{number}"
            number += 1
        names.append(name)
    return names


def shard(rows: list, spec: dict, seed: int) -> list:
    """The part of a data set's rows that its entry asks for: one of `shards`, equal but for a row, seeded."""
    if spec["shards"] is None:
        return rows
    places = list(range(len(rows)))
    random.Random(seed).shuffle(places)
    return [rows[place] for place in sorted(places[spec["shards_idx"]::spec["shards"]])]


def hold_out(samples: list[dict], size: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, held out): a seeded choice of `size` samples, or of that share of them where size is below 1.

    Samples of one row, or with a picture in common, stay on one side: so it may be fewer than `size`.
    """
    wanted = max(1, round(size * len(samples))) if size < 1 else size
    groups = groups_of(samples)
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen or len(chosen) == len(samples):
        which = "all" if chosen else "none"
        raise StageError(f"val_set_size: {size}: {which} of the {len(samples)} samples would be held out "
                         "(those that share a picture stay together)",
                         "change val_set_size, or name a file of its own under test_datasets")
    return ([sample for place, sample in enumerate(samples) if place not in chosen],
            [sample for place, sample in enumerate(samples) if place in chosen])


def weighted(samples: list[dict], seed: int) -> list[dict]:
    """The samples of an epoch: of weight 2.5, each twice and a seeded half of the data set a third time."""
    sizes = Counter(sample["of"] for sample in samples)
    again: dict[str, set[int]] = {}
    for sample in samples:
        name, share = sample["of"], sample["weight"] % 1
        if name not in again:
            chosen = random.Random(f"{seed} {name}").sample(range(sizes[name]), round(share * sizes[name]))
            again[name] = set(chosen)
    found, seen = [], Counter()
    for sample in samples:
        times = int(sample["weight"]) + (seen[sample["of"]] in again[sample["of"]])
        seen[sample["of"]] += 1
        names = [sample["sample_id"], *(f"{sample['sample_id']}~{n}" for n in range(2, times + 1))][:times]
        found += [{**sample, "sample_id": name} for name in names]
    if not found:
        raise StageError("datasets: with these weights, no sample is left to train on", "raise a weight")
    return found


def groups_of(samples: list[dict]) -> list[list[int]]:
    """The places of samples that must stay together: union-find over their rows and pictures."""
    parent: dict[str, str] = {}

    def leader(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    rows = [f"{sample['dataset']}#{sample['row']}" for sample in samples]
    for row, sample in zip(rows, samples):
        for medium in sample["media"]:
            parent[leader(medium["sha256"])] = leader(row)
    groups = defaultdict(list)
    for place, row in enumerate(rows):
        groups[leader(row)].append(place)
    return list(groups.values())


def save(samples: list[dict], folder: Path) -> None:
    """One Arrow folder for datasets.load_from_disk, byte for byte the same for the same samples."""
    import datasets
    datasets.disable_progress_bars()
    features = datasets.Features({name: feature(kind) for name, kind in SAMPLE.items()})
    columns = {name: [sample[name] for sample in samples] for name in SAMPLE}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(str(folder), num_shards=None if samples else 1)    # it can't load zero shards


def feature(kind):
    """The datasets feature of a kind: a type's name, a list of one kind, or a record."""
    from datasets import List, Value
    if isinstance(kind, list):
        return List(feature(kind[0]))
    return {name: feature(inner) for name, inner in kind.items()} if isinstance(kind, dict) else Value(kind)


def write_lines(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

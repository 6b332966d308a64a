"""Rows come from any file, folder or data set, by the part of it that a recipe names, each with its place."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from lib.data import files, samples, sources
from lib.run.errors import StageError

NOWHERE = {"path": "", "name": None, "revision": None, "data_files": None, "ds_type": None, "split": None,
           "media_root": None}
TEN = [{"prompt": f"{number}?", "completion": f"{number}"} for number in range(10)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own, which is the current one, for rows and for the cache of `datasets`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    jsonl(Path("rows/ten.jsonl"), TEN)
    return tmp_path


def jsonl(path: Path, rows: list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def found(**spec) -> list[str]:
    """The prompts of an entry's rows, which are as many as they are said to be."""
    source = sources.rows(NOWHERE | spec)
    rows = [files.parsed(row) for _, _, row in source]
    assert len(rows) == len(source) == len(list(source))
    return [row["prompt"] for row in rows]


def picked(*numbers: int) -> list[str]:
    return [f"{number}?" for number in numbers]


@pytest.mark.parametrize("split, numbers", [
    (None, range(10)), ("train", range(10)), ("anything", range(10)), ("train[:3]", range(3)),
    ("train[:20%]", range(2)), ("train[80%:]", (8, 9)), ("train[-1:]", (9,)), ("train[2:4]+train[:1]", (2, 3, 0)),
])
def test_a_split_takes_its_part_of_any_source(split, numbers):
    datasets.Dataset.from_list(TEN).save_to_disk("saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(TEN)).save_to_disk("splits")
    wanted = picked(*numbers)
    assert found(path="rows/ten.jsonl", split=split) == wanted
    assert found(path="saved", split=split) == wanted
    if split != "anything":
        assert found(path="splits", split=split) == wanted


def test_datasets_loads_what_data_files_name_by_kind_or_folder():
    assert found(path="json", data_files="rows/ten.jsonl") == picked(*range(10))
    assert found(path="rows") == picked(*range(10))
    assert found(path="rows", data_files=["ten.jsonl"], split="train[:10%]") == picked(0)


def test_a_row_keeps_its_line_when_a_split_takes_a_part():
    ((number, where, _),) = sources.rows(NOWHERE | {"path": "rows/ten.jsonl", "split": "train[7:8]"})
    assert (number, where) == (7, "rows/ten.jsonl:8")


def test_ds_type_says_what_a_file_is_where_its_name_does_not():
    Path("rows/ten.jsonl").rename("rows/ten.txt")
    assert found(path="rows/ten.txt", ds_type="jsonl") == picked(*range(10))
    assert found(path="rows/ten.txt", ds_type="json") == picked(*range(10))     # an object a line


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_an_image_folder_gives_its_metadata_with_the_pictures(metadata, folder):
    rows = [{"file_name": "a.png", "question": "What?", "answer": "red"}]
    Path("seen").mkdir()
    Image.new("RGB", (1, 1)).save("seen/a.png")
    if metadata.endswith(".jsonl"):
        jsonl(Path("seen") / metadata, rows)
    elif metadata.endswith(".csv"):
        datasets.Dataset.from_list(rows).to_csv(f"seen/{metadata}", index=False)
    else:
        datasets.Dataset.from_list(rows).to_parquet(f"seen/{metadata}")
    spec = NOWHERE | {"path": "seen"}
    ((_, where, row),) = sources.rows(spec)
    assert files.parsed(row) == {"image": "a.png", "question": "What?", "answer": "red"}
    assert where.startswith(f"seen/{metadata}") and sources.root(spec) == Path("seen")


@pytest.mark.parametrize("name, separator", [("rows.csv", ","), ("rows.TSV", "\t")])
def test_a_file_of_cells_gives_texts_and_nothing_for_an_empty_one(name, separator):
    cells = [["question", "answer", "image"], ['"Ä?\n', "3", "a.png"], [f"b{separator}c", '{"a": 1}', ""]]
    with Path(name).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([*cells, []])
    rows = list(sources.rows(NOWHERE | {"path": name}))
    assert [where for _, where, _ in rows] == [f"{name}: row 0", f"{name}: row 1"]
    assert [row for _, _, row in rows] == [dict(zip(cells[0], cells[1])), {**dict(zip(cells[0], cells[2])), "image": None}]


def test_a_cell_may_be_as_long_as_it_likes():
    Path("rows.csv").write_text(f"prompt,completion\n{'a' * 10**6},b\n", encoding="utf-8")
    assert found(path="rows.csv") == ["a" * 10**6]


def test_columns_of_file_names_are_called_by_what_they_hold():
    row = {"file_name": "a.wav", "images_file_names": ["a.png"], "video_file_name": "a.mp4", "text": "hi"}
    assert sources.named_media(row) == {"audio": "a.wav", "images": ["a.png"], "video": "a.mp4", "text": "hi"}


def test_media_root_is_where_relative_paths_start():
    assert sources.root(NOWHERE | {"path": "rows/ten.jsonl"}) == Path("rows")
    assert sources.root(NOWHERE | {"path": "rows/ten.jsonl", "media_root": "seen"}) == Path("seen")


@pytest.mark.parametrize("given, folder", [
    ("rows/ten.csv", "rows"), (["rows/a.csv", "rows/b.csv"], "rows"), ("rows/*.csv", "rows"), (["a/a.csv", "b/b.csv"], "."),
])
def test_media_are_beside_the_data_files_that_a_kind_of_file_reads(given, folder):
    assert sources.root(NOWHERE | {"path": "csv", "data_files": given}) == Path(folder)
    assert sources.root(NOWHERE | {"path": "csv", "data_files": given, "media_root": "seen"}) == Path("seen")


def test_fewer_rows_of_a_parquet_file_are_read_at_a_time_where_they_hold_media(monkeypatch):
    rows = [{"image": bytes([number]) * 1000, "prompt": f"{number}"} for number in range(10)]
    datasets.Dataset.from_list(rows).to_parquet("seen.parquet")
    monkeypatch.setattr(files, "READ_BYTES", 4000)
    assert {len(batch) for batch in files.parquet_batches(Path("seen.parquet"))} <= {1, 2, 3, 4}
    assert found(path="seen.parquet") == [f"{number}" for number in range(10)]
    monkeypatch.setattr(files, "READ_BYTES", 1)
    assert found(path="seen.parquet") == [f"{number}" for number in range(10)]


CORRECT = "correct path, name, revision, data_files or split; a hub id is owner/name"
NETWORK = "load it once where there is a network, without HF_HUB_OFFLINE; or name a file that is here"
BAD = {
    "a hub id without a network": (
        {"path": "owner/rows"}, "datasets: owner/rows: can't be loaded: Couldn't reach", NETWORK),
    "a configuration of a hub id without a network": (
        {"path": "owner/rows", "name": "x", "revision": "main", "split": "train[:1%]"},
        "datasets: owner/rows: can't be loaded: Couldn't reach", NETWORK),
    "a missing file": ({"path": "no.jsonl"}, "datasets: no.jsonl: no such file or folder", "correct the path (a"),
    "a kind of file without a file": ({"path": "json"}, "datasets: json: names a kind of file", "add data_files: FILE"),
    "data_files that are not there": (
        {"path": "json", "data_files": "no.jsonl"}, "datasets: json: can't be loaded: Unable to find", CORRECT),
    "a split that a folder lacks": (
        {"path": "rows", "split": "nope"}, "datasets: rows: can't be loaded: Unknown split \"nope\"", CORRECT),
    "a configuration that a folder lacks": (
        {"path": "rows", "name": "nope"}, "datasets: rows: can't be loaded: BuilderConfig 'nope' not found", CORRECT),
    "a slice that is none": (
        {"path": "rows/ten.jsonl", "split": "train[:x]"}, "datasets: rows/ten.jsonl: split train[:x]: Unrecognized",
        "write train, train[:500], train[90%:] or a sum of these"),
    "a slice beyond a hundred percent": (
        {"path": "rows/ten.jsonl", "split": "train[:200%]"}, "datasets: rows/ten.jsonl: split train[:200%]: ", "write"),
    "several splits and none named": (
        {"path": "two"}, "datasets: two has the splits a, b, and the recipe names none", "write split: a"),
    "several splits of files and none named": (
        {"path": "parts"}, "datasets: parts has the splits train, test", "write which: split: train"),
    "files of several shapes": ({"path": "odd"}, "datasets: odd: can't be loaded: ", CORRECT),
    "a saved data set without its rows": ({"path": "cut"}, "datasets: cut: not a whole saved data set", "write the"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_source_that_cannot_be_read_is_an_error_of_two_lines(name):
    spec, what, fix = BAD[name]
    if spec["path"] == "two":
        datasets.DatasetDict({split: datasets.Dataset.from_list(TEN) for split in "ab"}).save_to_disk("two")
    jsonl(Path("parts/train.jsonl"), TEN), jsonl(Path("parts/test.jsonl"), TEN)
    jsonl(Path("odd/a.jsonl"), [{"a": 1}]), jsonl(Path("odd/b.jsonl"), [{"b": {"c": []}}])
    Path("cut").mkdir()
    Path("cut/state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StageError) as caught:
        sources.rows(NOWHERE | spec)
    assert caught.value.what.startswith(what) and "\n" not in caught.value.what
    assert caught.value.fix.startswith(fix)


# ---- weights ----


WEIGHTS = [{"weight": weight} for weight in (1, 0.5, 2.25)]


def test_a_weight_is_a_seeded_share_of_an_epoch():
    parts = np.split(np.arange(60), 3)
    first, again, other = (samples.weighted(parts, ["a", "b", "c"], WEIGHTS, seed).tolist() for seed in (1, 1, 2))
    assert [sum(place // 20 == of for place in first) for of in range(3)] == [20, 10, 45]
    assert first == again == sorted(first) and first != other
    assert {first.count(place) for place in range(40, 60)} == {2, 3}


def test_shards_are_seeded_parts_that_hold_every_row_once_in_its_order():
    rows = list(range(11))
    source = files.Source(len(rows), lambda: iter(rows))
    taken = [sources.shard(source, {"shards": 3, "shards_idx": n}, 1) for n in range(3)]
    parts = [list(part) for part in taken]
    assert sorted(sum(parts, [])) == rows and [*map(len, parts)] == [*map(len, taken)] == [4, 4, 3]
    assert all(part == sorted(part) for part in parts) and parts[0] != rows[::3]
    assert sources.shard(source, {"shards": None}, 1) is source


def test_a_weight_that_leaves_nothing_of_a_data_set_is_an_error():
    specs = [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 0.1}]
    with pytest.raises(StageError, match=r"b\.jsonl: weight 0\.1 leaves none of its 4 samples to train on"):
        samples.weighted([np.arange(3), np.arange(3, 7)], ["a", "b"], specs, 1)
    emptied = samples.weighted([np.arange(3), np.arange(0)], ["a", "b"], specs, 1)   # rejected or held out
    assert emptied.tolist() == [0, 1, 2]

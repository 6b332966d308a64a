"""02_data: the same samples from any file, everything counted, nothing lost, the same bytes every time."""

import csv
import json
import mmap
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from lib.collator import IGNORE_INDEX
from lib.data import files, measuring, samples, summary
from lib.data.rows import has_coordinates
from lib.export import fresh, proof
from lib.fast.store import Store
from lib.pages.seen import seen
from lib.run import ledger
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.text.processor import load_processor
from tests import harness
from tests.conftest import COLOURS, write_colours
from tests.harness import Bad, bad_input

QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}
CHAT = {"messages": [QUESTION, ANSWER]}
OPEN = {"messages": [QUESTION]}
TYPED = {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}
FLAT = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}" \
    "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def chat(question: str, answer: str = "red") -> dict:
    """A row of these two texts."""
    return {"messages": [QUESTION | {"content": question}, ANSWER | {"content": answer}]}


@pytest.fixture
def kit(tmp_path, monkeypatch, zoo, script):
    """A Kit in a folder of its own, which is the current one, with the data set of colours."""
    monkeypatch.chdir(tmp_path)
    write_colours(tmp_path)
    return Kit(tmp_path, zoo, script)


@dataclass
class Kit:
    """Runs the first two stages; a run's outputs are then in `out`."""

    folder: Path
    zoo: Callable[[str], Path]
    script: Callable
    out: Path = Path("run/02_data")

    def configure(self, *overrides: str, rows: list | None = None, base: str = "llava", **knobs) -> None:
        """01_config on a recipe for data.jsonl, which holds `rows` where they are given."""
        if rows is not None:
            write_jsonl(Path("data.jsonl"), rows)
        recipe = {"base_model": str(self.zoo(base)), "datasets": [{"path": "data.jsonl"}], "adapter": "lora"}
        Path("recipe.yaml").write_text(json.dumps(recipe | knobs), encoding="utf-8")
        self.script("01_config").main(["recipe.yaml", "run", *overrides])

    def run(self, *overrides: str, **more) -> None:
        """Both stages."""
        self.configure(*overrides, **more)
        self.script("02_data").main(["run"])

    def samples(self, split: str = "train") -> list[dict]:
        """What 02 wrote."""
        return list(datasets.load_from_disk(str(self.out / split)))

    def rejects(self) -> list[dict]:
        """rejects.jsonl, of a finished run or of one that stopped."""
        out = self.out if self.out.exists() else self.out.with_name("02_data.partial")
        return read_jsonl(out / "rejects.jsonl")

    def counts(self) -> dict:
        """What report.json counts."""
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))["counts"]


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the same samples from any file ----


def as_json(rows: list) -> str:
    Path("rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    return "rows.json"


def as_jsonl(rows: list) -> str:
    Path("rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return "rows.jsonl"


def as_csv(rows: list) -> str:
    with Path("rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)
    return "rows.csv"


def as_parquet(rows: list) -> str:
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    return "rows.parquet"


def as_arrow_stream(rows: list) -> str:
    return str(next(Path(as_saved_dataset(rows)).glob("*.arrow")).rename("rows.arrow"))


def as_arrow_file(rows: list) -> str:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file("rows.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=3)
    return "rows.arrow"


def as_saved_dataset(rows: list) -> str:
    datasets.Dataset.from_list(rows).save_to_disk("rows")
    return "rows"


def as_saved_split(rows: list) -> str:
    train, test = (datasets.Dataset.from_list(part) for part in (rows, rows[:1]))
    datasets.DatasetDict(train=train, test=test).save_to_disk("rows")
    return "rows"


WRITERS = [as_json, as_jsonl, as_csv, as_parquet, as_arrow_stream, as_arrow_file, as_saved_dataset, as_saved_split]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_any_kind_of_file_gives_the_samples_that_its_rows_describe(write, kit):
    rows = read_jsonl(Path("data.jsonl"))
    for row in rows:  # a saved data set is a folder, in which the pictures are not
        row["images"] = [str(kit.folder / row["images"][0])]
    kit.run(datasets=[{"path": write(rows), "split": "train"}])
    found = kit.samples()
    assert [sample["sample_id"] for sample in found] == [f"rows-{number}" for number in range(len(COLOURS))]
    for sample, colour in zip(found, COLOURS):
        text = f"USER: <image>\nWhich colour is it? ASSISTANT: {colour}</s>"
        assert sample["text"] == text
        assert [text[span["start"]:span["end"]] for span in sample["spans"]] == [f" {colour}</s>"]
        assert [medium["path"] for medium in sample["media"]] == [str(kit.folder / f"{colour}.png")]


def test_a_saved_data_set_of_pictures_keeps_their_bytes(kit):
    columns = {"messages": [CHAT["messages"]] * 2, "image": ["red.png", "green.png"]}
    features = datasets.Dataset.from_dict(columns).features | {"image": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk("saved")
    kit.run(datasets=[{"path": "saved"}])
    kept = [sample["media"][0]["bytes"] for sample in kit.samples()]
    assert kept == [Path("red.png").read_bytes(), Path("green.png").read_bytes()]


def test_a_chat_template_that_is_kept_with_the_tokenizer_alone_serves(kit):
    base = Path(shutil.copytree(kit.zoo("qwen2_5_vl"), "base"))
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "chat_template.jinja").unlink()
    kit.run(base_model="base", rows=[CHAT])
    assert kit.samples()[0]["text"].endswith("<|im_start|>assistant\nred<|im_end|>\n")


def test_a_reply_ends_at_the_next_header_where_the_checkpoints_generation_stops_at_it(kit):
    kit.run(base="glm46v", rows=[{"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}])
    (sample,) = kit.samples()
    trained = [sample["text"][span["start"]:span["end"]] for span in sample["spans"]]
    assert len(trained) == 2 and all(text.endswith("red<|user|>") for text in trained)
    assert kit.counts()["replies_ended_by_the_kit"] == 1  # the first was ended by the question after it


def test_a_template_that_rewrites_history_gives_a_sample_for_each_reply(kit):
    jinja = FLAT.replace("}}:{%", "}}:{{ '(last)' if loop.last and m.role == 'assistant' }}{%")
    row = {"messages": [QUESTION, ANSWER, QUESTION, ANSWER], "image": "red.png"}
    kit.run(rows=[row], chat_template=jinja)
    first = "user:<image>What is it?</s>assistant:"
    assert [(sample["sample_id"], sample["text"], len(sample["media"])) for sample in kit.samples()] == [
        ("data-0", f"{first}red</s>user:What is it?</s>assistant:(last)red</s>", 1),
        ("data-0.1", f"{first}(last)red</s>", 1)]


# ---- what is kept, dropped and held out ----


def test_all_bad_rows_are_listed_with_row_and_reason_and_the_others_kept(kit):
    rows = [CHAT, OPEN, TYPED, CHAT | {"image": "nope.png"}, TYPED | {"image": "red.png"}]
    kit.run("on_bad_row=skip", rows=rows)
    assert [(reject["row"], reject["where"], reject["reason"]) for reject in kit.rejects()] == [
        (1, "data.jsonl:2", "nothing to learn: no assistant message has a text"),
        (2, "data.jsonl:3", "1 image placeholder, but 0 listed pictures"),
        (3, "data.jsonl:4", "nope.png: no such file")]
    assert [sample["row"] for sample in kit.samples()] == [0, 4]
    assert kit.counts()["rejected_rows"] == 3


def test_with_on_bad_row_error_all_rows_are_looked_at_before_it_stops(kit):
    with pytest.raises(StageError) as caught:
        kit.run(rows=[OPEN, CHAT, 3])
    reason = "nothing to learn: no assistant message has a text"
    assert caught.value.what == f"data.jsonl:1: {reason} (and 1 more bad row)"
    listed = "all are in run/02_data.partial/rejects.jsonl"
    assert caught.value.fix.endswith(f"; {listed}; or go without: on_bad_row=skip")
    assert [reject["row"] for reject in kit.rejects()] == [0, 2]


def test_a_sample_over_sequence_len_is_dropped_with_its_length(kit):
    kit.run("on_bad_row=skip", "sequence_len=60", rows=[CHAT, CHAT | {"images": ["red.png"] * 3}])
    assert [sample["row"] for sample in kit.samples()] == [0]
    (reject,) = kit.rejects()
    assert reject["row"] == 1 and reject["reason"].endswith(" tokens, over sequence_len 60")


def test_lengths_are_those_of_the_encoded_sample(kit):
    kit.run(rows=[CHAT | {"images": ["red.png", "green.png"]}])
    (sample,), (row,) = kit.samples(), read_jsonl(kit.out / "preview.jsonl")
    assert sample["input_tokens"] == len(row["input_ids"])
    assert sample["media_tokens"] == row["media_tokens"] == row["tokens"].count("<image>") == 2 * 16
    assert sample["supervised_tokens"] == len(["▁", "re", "d", "</s>"])


@pytest.mark.parametrize("base", ["llava", "qwen2_5_vl", "gemma3"])
def test_several_processes_measure_what_one_does_and_what_encoding_gives(base, kit):
    rows = [chat(f"What is {'very ' * (n % 7)}{n}?", f" {n * n}\n" if n % 5 else "ré " * n) for n in range(150)]
    rows[20:20] = [OPEN, CHAT | {"image": "red.png"}, CHAT | {"image": "nope.png"}]
    kit.run("dataset_processes=2", "on_bad_row=skip", "train_on_inputs=true", base=base, rows=rows)
    found, rejects = kit.samples(), kit.rejects()
    assert [reject["where"] for reject in rejects] == ["data.jsonl:23"] and len(found) == 152
    encoder = Encoder.load(kit.out / "processor")
    for sample in found[:60:3]:
        encoded = encoder(sample)
        trained = int((encoded["labels"][0, 1:] != IGNORE_INDEX).sum())
        assert (encoded["input_ids"].shape[1], trained) == (sample["input_tokens"], sample["supervised_tokens"])
    kit.configure("dataset_processes=1", "on_bad_row=skip", "train_on_inputs=true", base=base)
    kit.script("02_data").main(["run", "--force"])
    assert kit.samples() == found and kit.rejects() == rejects


def test_parts_for_processes_are_as_large_as_rows_allow():
    def sizes(rows: list) -> list[int]:
        parts = list(measuring.cut(files.numbered(Path("x"), [rows])))
        assert [row for part in parts for _, _, row in part] == rows
        return [len(part) for part in parts]
    assert sizes([]) == []
    assert sizes([CHAT] * 150) == [64, 64, 22]
    assert sizes([b"{}"] * 20_000) == [256] * 78 + [32]
    media = CHAT | {"images": [{"bytes": bytes(3 * 2**20)}]}
    assert sizes([media] * 5) == [2, 2, 1]


def test_held_out_samples_are_a_seeded_choice(kit):
    def held_out(*overrides: str) -> set[int]:
        kit.run(*overrides)
        train, found = ({sample["row"] for sample in kit.samples(split)} for split in ("train", "eval"))
        assert train | found == set(range(len(COLOURS))) and not train & found
        return found
    three = held_out("val_set_size=3")
    assert len(three) == 3
    assert held_out("val_set_size=3", "max_steps=9") == three
    assert held_out("val_set_size=3", "seed=1") != three
    assert len(held_out("val_set_size=0.25")) == 2
    assert len(held_out("val_set_size=0.001")) == 1


def test_fewer_samples_than_val_set_size_says_are_held_out_with_a_word(kit, capsys):
    rows = [CHAT | {"image": f"{colour}.png"} for colour in COLOURS[:3] for _ in range(3)]
    kit.run("val_set_size=4", rows=rows)
    assert len(kit.samples("eval")) == 3
    said = "val_set_size: 4: 3 of 4 samples are held out, since those that share a row or picture stay together"
    assert said in capsys.readouterr().out
    kit.run("val_set_size=3", rows=rows)
    assert "are held out, since" not in capsys.readouterr().out


def test_test_datasets_are_held_out_and_their_samples_have_names_of_their_own(kit):
    write_colours(Path("other"), rows=2)
    kit.run(test_datasets=[{"path": "other/data.jsonl"}])
    assert len(kit.samples()) == len(COLOURS)
    held_out = [(sample["sample_id"], sample["media"][0]["path"]) for sample in kit.samples("eval")]
    assert held_out == [("data.2-0", "other/red.png"), ("data.2-1", "other/green.png")]


def test_held_out_samples_that_are_trained_on_are_told(kit, capsys):
    kit.run(test_datasets=[{"path": "data.jsonl", "split": "test"}])       # a file has no splits: it is all rows
    said = "warning: 8 of 8 held-out samples have the text and media of training samples"
    assert said in " ".join(capsys.readouterr().out.split())
    write_colours(Path("other"), rows=2)
    lines = Path("other/data.jsonl").read_text(encoding="utf-8")
    Path("other/data.jsonl").write_text(lines.replace("red.png", "green.png"), encoding="utf-8")
    kit.run(test_datasets=[{"path": "other/data.jsonl"}])
    assert "warning: 1 of 2 held-out samples have" in " ".join(capsys.readouterr().out.split())


def sample_of(row: int, *pictures: str) -> dict:
    return {"dataset": "d", "row": row, "media": [{"sha256": picture} for picture in pictures]}


def table_of(every: list[dict]) -> pyarrow.Table:
    return pyarrow.Table.from_batches([samples.batch_of(every[:4]), samples.batch_of(every[4:])])


@pytest.mark.parametrize("seed", range(20))
def test_samples_that_share_a_picture_or_a_row_stay_on_one_side(seed):
    rows = [(0, "a"), (0,), (1, "a", "b"), (2, "b"), (3, "c"), (4,), (5,), (6, "c"), (7, "d"), (8, "d", "e")]
    every = [sample_of(*row) for row in rows]
    together = [{0, 1, 2, 3}, {4, 7}, {5}, {6}, {8, 9}]
    for size in (1, 3, 5, 0.3, 0.9):
        train, places = map(set, samples.hold_out(table_of(every), size, seed))
        assert train | places == set(range(len(every))) and not train & places
        assert places == set().union(*(group for group in together if group & places))
        assert 1 <= len(places) <= (size if size >= 1 else round(size * len(every)))


def test_a_chain_of_ten_thousand_shared_pictures_is_one_group_at_once():
    chain = [sample_of(number, f"{number}", f"{number + 1}") for number in range(10_000)]
    assert not samples.groups_of(table_of(chain)).any()


# ---- what it writes ----


def test_chosen_samples_are_saved_once_for_each_time_whatever_batches_they_lie_in(tmp_path):
    every = [sample_of(number, "a" * number) | {"sample_id": f"d-{number}"} for number in range(9)]
    found = samples.save(table_of(every), np.array([0, 2, 2, 2, 3, 4, 4, 8]), tmp_path / "train")
    assert found["sample_id"][:] == ["d-0", "d-2", "d-2~2", "d-2~3", "d-3", "d-4", "d-4~2", "d-8"]
    assert [len(media[0]["sha256"]) for media in found["media"]] == found["row"][:] == [0, 2, 2, 2, 3, 4, 4, 8]
    assert len(samples.save(table_of(every), np.array([], int), tmp_path / "eval")) == 0


def test_the_media_of_a_batch_may_have_more_bytes_than_32_bits_count():
    """The first medium's 2 GiB are pages that nobody looks at."""
    batch = samples.batch_of([sample_of(number, f"{number}") for number in range(2)])
    pages = mmap.mmap(-1, 2**31 + 3)
    pages[-3:] = b"end"
    places = pyarrow.py_buffer(np.array([0, 2**31, 2**31 + 3]))
    held = pyarrow.Array.from_buffers(samples.MEDIUM.field("bytes").type, 2,
                                      [None, places, pyarrow.py_buffer(pages)])
    columns = [held if field.name == "bytes" else pyarrow.nulls(2, field.type) for field in samples.MEDIUM]
    media = pyarrow.ListArray.from_arrays([0, 1, 2], pyarrow.StructArray.from_arrays(
        columns, fields=list(samples.MEDIUM)))
    batch = batch.set_column(batch.schema.names.index("media"), batch.schema.field("media"), media)
    (chosen,) = samples.chosen(pyarrow.Table.from_batches([batch]), np.array([1, 1]))
    assert [each[0]["bytes"] for each in chosen["media"].to_pylist()] == [b"end", b"end"]


def test_the_preview_holds_the_first_sixteen_kept_rows_as_training_sees_them(kit):
    numbered = [{"role": "assistant", "content": f"red {number}"} for number in range(1, 19)]
    good = [{"messages": [QUESTION, answer], "images": ["red.png"]} for answer in numbered]
    kit.run("on_bad_row=skip", rows=[OPEN, *good])
    preview = read_jsonl(kit.out / "preview.jsonl")
    assert [row["row"] for row in preview] == list(range(1, 17))
    for row in preview:
        assert " ".join(row) == "sample_id row dataset input_ids labels tokens images media_tokens"
        assert (row["images"], row["media_tokens"]) == (1, 16)
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["tokens"])
        trained = [token for token, label in zip(row["tokens"], row["labels"]) if label != -100]
        assert "".join(trained) == f"▁red▁{row['row']}</s>"
        assert all(label in (-100, token_id) for label, token_id in zip(row["labels"], row["input_ids"]))


def test_the_page_shows_the_pictures_and_every_token(kit):
    kit.run()
    page = (kit.out / "preview.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(COLOURS)
    assert all(f"data-{number}" in page for number in range(len(COLOURS)))
    assert page.count("<mark>") >= len(COLOURS)
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("holds, pictures", [("none", 0), ("eval", 2), ("all", len(COLOURS))])
def test_the_page_holds_the_pictures_that_report_media_allows_and_says_so(holds, pictures, kit):
    kit.run("val_set_size=2")
    before = ledger.digest(kit.out)
    kit.run("val_set_size=2", f"report_media={holds}")
    page = (kit.out / "preview.html").read_text(encoding="utf-8")
    assert page.count('src="data:image') == pictures and f"(report_media: {holds})" in page
    assert page.count("not in this page") == len(COLOURS) - pictures
    assert ledger.digest(kit.out) == before                        # so that what was trained stays up to date


def test_the_page_shows_the_longest_the_shortest_and_the_least_trained_samples_and_every_data_set(kit):
    words = ["short", "long " * 90, "middle " * 20]
    rows = [{"messages": [{"role": "user", "content": f"{each}?"}, ANSWER]} for each in words * 9]
    write_jsonl(Path("more.jsonl"), rows)
    kit.run(datasets=[{"path": "data.jsonl"}, {"path": "more.jsonl"}])
    page = (kit.out / "preview.html").read_text(encoding="utf-8")
    shown = re.findall(r"<h3[^>]*>(The \w+(?: \w+)?|[\w.-]+)</h3>", page.partition("Extremes</h2>")[2])
    assert shown[:4] == ["The longest", "more-1", "more-4", "more-7"]
    assert shown[8:] == ["The least trained", "more-1", "more-4", "more-7"] and shown[4] == "The shortest"
    assert page.count("shown above") >= 3                          # in full once
    assert all(f"<td>{name}</td>" in page for name in ("data.jsonl", "more.jsonl", "all"))
    for name in ("tokens per sample", "trained share of a sample", "media tokens per sample that has media",
                 "longer side of a picture, as given"):
        assert f"Histogram of {name}" in page
    report = json.loads((kit.out / "report.json").read_text(encoding="utf-8"))
    assert [each["train_samples"] for each in report["datasets"].values()] == [len(COLOURS), len(rows)]


@pytest.mark.parametrize("name, size", [("llava", (32, 32)), ("qwen2_5_vl", (64, 48)), ("gemma4_e2b", (108, 84))])
def test_a_picture_is_shown_at_the_size_that_the_model_gets(name, size, zoo):
    processor = load_processor(zoo(name))
    image = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    (shown,) = seen(processor, image)
    assert shown.size == size
    assert shown.getpixel((0, 0))[0] < 20 and shown.getpixel((0, size[1] - 1))[0] > 235


def test_the_tiles_of_a_picture_are_shown_as_they_are(zoo):
    image = Image.new("RGB", (640, 480), "red")
    tiles = seen(load_processor(zoo("smolvlm2")), image)
    assert [tile.size for tile in tiles] == [(32, 32)] * 5
    assert all(tile.getpixel((16, 16)) == (255, 0, 0) for tile in tiles)


def test_two_runs_write_the_same_bytes(kit):
    def outputs() -> dict[str, str]:
        ledger = json.loads((kit.out / "stage.json").read_text(encoding="utf-8"))
        return {file: stamp["sha256"] for file, stamp in ledger["wrote"].items()}
    bad = [OPEN, 3, CHAT | {"image": "data.jsonl"}]
    kit.run("val_set_size=2", "on_bad_row=skip", rows=[*read_jsonl(Path("data.jsonl")), *bad])
    first = outputs()
    kit.script("02_data").main(["run", "--force"])
    assert outputs() == first
    assert first.keys() >= {"report.json", "rejects.jsonl", "preview.jsonl"}
    assert first.keys() >= {"train/state.json", "eval/state.json", "processor/encoder.json"}


def test_the_saved_processor_makes_the_tensors_that_were_measured(kit):
    jinja = FLAT.replace("<image>", "<|image_pad|>").replace("</s>", "<|im_end|>")
    Path("own.jinja").write_text(jinja, encoding="utf-8")
    smaller = {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    kit.run(base="qwen2_5_vl", processor_kwargs=smaller, chat_template="own.jinja")
    encoder = Encoder.load(kit.out / "processor")
    assert encoder.processor.chat_template == jinja
    for sample in kit.samples():
        assert encoder(sample)["input_ids"].shape[1] == sample["input_tokens"]
        assert sample["media_tokens"] <= 1024 / 16**2


def test_a_changed_picture_or_template_runs_the_stage_again(kit, capsys):
    def runs() -> bool:
        kit.script("02_data").main(["run"])
        return "is up to date" not in capsys.readouterr().out
    Path("own.jinja").write_text(FLAT, encoding="utf-8")
    Path("bad.png").write_bytes(b"")
    kit.configure("on_bad_row=skip", rows=[CHAT, CHAT | {"image": "bad.png"}], chat_template="own.jinja")
    assert runs() and not runs()
    shutil.copy("red.png", "bad.png")  # a rejected row's picture was read as well
    assert runs() and not runs()
    Path("own.jinja").write_text(FLAT.replace("</s>", ".</s>"), encoding="utf-8")
    assert runs() and not runs()


def test_show_prints_samples_and_writes_nothing(kit, capsys):
    kit.run()
    before = harness.contents(kit.folder)
    capsys.readouterr()
    kit.script("02_data").main(["run", "--show", "99"])
    shown = capsys.readouterr().out
    for number, colour in enumerate(COLOURS):
        assert f"data-{number}: " in shown and f"ASSISTANT: {colour}</s>" in shown
    assert "train samples" in shown and "where mistakes show first" in shown and "least trained" in shown
    assert harness.contents(kit.folder) == before


# ---- length and resolution ----

LONG = chat("What is it?", "red " * 60)


def test_what_is_too_long_is_dropped_listed_and_counted_without_a_stop(kit):
    kit.run("sequence_len=60", rows=[CHAT, LONG])
    assert [sample["row"] for sample in kit.samples()] == [0]
    (reject,) = kit.rejects()
    assert reject["too_long"] and reject["reason"].endswith(" tokens, over sequence_len 60")
    assert kit.counts()["rows_over_sequence_len"] == 1


@pytest.mark.parametrize("short, warned", [(8, True), (9, False)])
def test_a_tenth_and_more_of_a_data_sets_rows_that_are_too_long_is_a_warning(short, warned, kit, capsys):
    write_jsonl(Path("short.jsonl"), [CHAT] * 9)
    kit.run("sequence_len=60", rows=[CHAT] * short + [LONG], datasets=[{"path": "short.jsonl"}, {"path": "data.jsonl"}])
    said = "warning: data.jsonl: 1 of 9 rows (11%) are over sequence_len; 02_data/rejects.jsonl says"
    assert (said in capsys.readouterr().out) == warned


@pytest.mark.parametrize("base, words, strategy, fix", [
    ("llava", "red", "drop", "sequence_len: 128, or shorten the row"),             # whose pictures have one size
    ("qwen2_5_vl", "red " * 300, "drop", "sequence_len: 2048, or shorten the row"),
    ("qwen2_5_vl", "red", "truncate",
     "sequence_len: 128, or excess_length_strategy: shrink_media, or a max_image_tokens for all pictures"),
    ("qwen2_5_vl", "red", "shrink_media", "sequence_len: 128, or shorten the row"),
])
def test_the_fix_of_a_row_that_is_too_long_holds_it_and_names_what_makes_most_of_it_smaller(base, words, strategy, fix, kit):
    Image.effect_noise((400, 400), 90).save("large.png")
    long = chat("What? ", words) | {"images": ["large.png"] * 4}
    kit.run("sequence_len=62", f"excess_length_strategy={strategy}", base=base, rows=[CHAT, long])
    (reject,) = kit.rejects()
    assert reject["too_long"] and reject["fix"] == fix
    held = int(re.match(r"sequence_len: (\d+)", fix)[1])
    kit.run(f"sequence_len={held}", base=base, rows=[CHAT, long])
    assert held // 2 < kit.samples()[1]["input_tokens"] <= held


def test_a_text_is_cut_behind_its_last_medium_and_only_there(kit):
    rows = [LONG | {"images": ["red.png"]}, CHAT, CHAT | {"images": ["red.png"] * 5},
            {"messages": [QUESTION, ANSWER, QUESTION | {"content": "why? " * 60}, ANSWER]}]
    kit.run("sequence_len=64", "excess_length_strategy=truncate", rows=rows)
    cut, whole, first = kit.samples()
    assert cut["input_tokens"] == first["input_tokens"] == 64 > whole["input_tokens"]
    assert (cut["media_tokens"], len(cut["media"])) == (16, 1)
    (span,) = cut["spans"]
    assert cut["text"].startswith("USER: <image>\nWhat is it? ASSISTANT: red red")
    assert span["end"] == len(cut["text"]) and "</s>" not in cut["text"]
    assert [first["text"][span["start"]:span["end"]] for span in first["spans"]] == [" red</s>"]
    encoder = Encoder.load(kit.out / "processor")
    assert all(encoder(sample)["input_ids"].shape[1] == sample["input_tokens"] for sample in (cut, first))
    (reject,) = kit.rejects()
    assert reject["row"] == 2 and reject["reason"].startswith("cut to sequence_len 64 behind its last medium")
    assert kit.counts()["samples_cut_to_sequence_len"] == 2


def test_a_row_whose_cut_leaves_nothing_to_learn_is_rejected(kit):
    kit.run("sequence_len=32", "excess_length_strategy=truncate", rows=[CHAT, chat("why? " * 60)])
    assert [sample["row"] for sample in kit.samples()] == [0]
    assert kit.rejects()[0]["reason"] == "cut to sequence_len 32 behind its last medium, it teaches nothing"


def test_a_budget_of_pixels_and_a_size_reach_the_samples_and_the_saved_encoder(kit):
    rows = [CHAT | {"image": "purple.png"}, CHAT | {"image": "red.png"}]
    kit.run("image_max_pixels=1024", base="qwen2_5_vl", rows=rows)
    assert kit.counts()["tokens_per_picture"] == 4 + 2  # with those around a picture
    assert Encoder.load(kit.out / "processor").processor.image_processor.size["longest_edge"] == 1024
    kit.run("image_size=[32, 64]", base="qwen2_5_vl", rows=rows)
    assert {(medium["width"], medium["height"]) for sample in kit.samples() for medium in sample["media"]} == {(32, 64)}
    encoder = Encoder.load(kit.out / "processor")
    assert all(encoder(sample)["input_ids"].shape[1] == sample["input_tokens"] for sample in kit.samples())


# ---- several data sets ----


def test_pictures_of_a_row_that_is_too_long_are_shrunk_until_it_fits_and_no_others(kit, tmp_path, capsys):
    Image.effect_noise((400, 400), 90).save("large.png")
    rows = [CHAT | {"image": "large.png"}, CHAT | {"image": "red.png"}, chat("What? " * 40) | {"image": "large.png"}]
    kit.run("sequence_len=70", "excess_length_strategy=shrink_media", base="qwen2_5_vl", rows=rows)
    (reject,) = kit.rejects()
    assert reject["row"] == 2 and reject["reason"].endswith("tokens, over sequence_len 70, even with the smallest pictures")
    shrunk, whole = kit.samples()
    assert shrunk["image_bounds"] and not whole["image_bounds"]
    encoder = Encoder.load(kit.out / "processor")
    assert "tokens per picture: " in capsys.readouterr().out
    assert encoder(shrunk)["input_ids"].shape[1] == shrunk["input_tokens"] <= 70
    free = encoder(shrunk | {"image_bounds": None})
    assert free["input_ids"].shape[1] > 70 and free["pixel_values"].shape != encoder(shrunk)["pixel_values"].shape
    made = proof.inputs(encoder.processor, fresh.proof_row(shrunk, encoder, tmp_path))      # what 06 proves
    assert torch.equal(made["pixel_values"], encoder(shrunk)["pixel_values"])
    (_, high, wide), side = encoder(shrunk)["image_grid_thw"][0].tolist(), encoder.processor.image_processor.patch_size
    page = (kit.out / "preview.html").read_text(encoding="utf-8")
    assert f"400 × 400, seen at {side * wide} × {side * high}" in page
    store = Store(tmp_path, "")
    assert store.pictures(shrunk) != store.pictures(shrunk | {"image_bounds": None})


def test_a_budget_of_tokens_reaches_the_samples_and_a_family_without_one_is_refused(kit):
    Image.effect_noise((400, 400), 90).save("large.png")
    kit.run("max_image_tokens=12", base="qwen2_5_vl", rows=[CHAT | {"image": "large.png"}])
    assert [sample["media_tokens"] for sample in kit.samples()] == [9 + 2]         # a square of 3, and the two around it
    kit.configure("excess_length_strategy=shrink_media")
    with pytest.raises(StageError, match="excess_length_strategy: LLaVA-1.5 and Pixtral makes every picture of one size"):
        kit.script("02_data").main(["run", "--force"])


@pytest.mark.parametrize("text, found", [
    ("<box>(1, 2)</box>", True), ("<|box_start|>(12,50),(80,99)<|box_end|>", True), ('{"bbox_2d": [1]}', True),
    ("at [0.1, 0.25, 0.5, 0.75].", True), ("<loc0123>", True), ('<point x="3">', True),
    ("see [1] and f(x, y), in a box", False), ("1, 2, 3, 4", False)])
def test_boxes_and_points_are_found_in_a_rows_texts(text, found):
    assert has_coordinates([{"content": [{"type": "image"}, {"type": "text", "text": text}]}]) == found


def test_rows_with_boxes_whose_pictures_are_resized_are_counted_in_a_warning(capsys):
    sample = {"dataset": "a", "pictures": 2, "media_tokens": 600, "input_tokens": 1000}
    given = table_of([sample | {"row": row, "coordinates": row != 3, "image_bounds": "{}" if row == 1 else None}
                      for row in (0, 1, 2, 2, 3)])
    summary.say_tokens_per_picture(given, np.arange(5), resized=True)
    said = capsys.readouterr().out
    assert "tokens per picture: 300 to 300, 300 on average" in said and "warning: 3 rows with boxes or points" in said
    assert [line.split() for line in said.splitlines() if line.split()[:1] == ["256"]] == [["256", "440", "9%"]]
    summary.say_tokens_per_picture(given, np.arange(5), resized=False)
    assert "warning: 1 row with boxes" in capsys.readouterr().out


def test_data_sets_have_keys_knobs_and_weights_of_their_own(kit):
    write_jsonl(Path("share.jsonl"), [{"conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "red"}], "image": "red.png"}])
    write_jsonl(Path("qa.jsonl"), [{"question": "What?", "answer": "red"}] * 4)
    kit.run(datasets=[{"path": "share.jsonl", "weight": 2},
                      {"path": "qa.jsonl", "weight": 0.5, "train_on_inputs": True, "train_on_eos": "none",
                       "system_prompt": "Be brief."}])
    found = kit.samples()
    ids = [sample["sample_id"] for sample in found]
    assert ids[:2] == ["share-0", "share-0~2"] and len(ids) == 4 and all(name.startswith("qa-") for name in ids[2:])
    assert found[0]["text"] == "USER: <image>\nWhat? ASSISTANT: red</s>"
    trained = [found[2]["text"][span["start"]:span["end"]] for span in found[2]["spans"]]
    assert trained == ["Be brief.", " What?", " red"]


def test_a_data_set_may_have_a_chat_template_of_its_own(kit):
    plain = FLAT.replace("assistant:", "A:").replace("{{ m.role }}", "{{ 'A' if m.role == 'assistant' else 'Q' }}")
    Path("plain.jinja").write_text(plain, encoding="utf-8")
    sets = [{"path": "data.jsonl"}, {"path": "data.jsonl", "chat_template": "plain.jinja"},
            {"path": "data.jsonl", "chat_template": "llava"}]
    kit.run("chat_template=" + FLAT, rows=[CHAT], datasets=sets)
    assert [sample["text"] for sample in kit.samples()] == [
        "user:What is it?</s>assistant:red</s>", "Q:What is it?</s>A:red</s>", "USER: What is it? ASSISTANT: red</s>"]
    kit.configure(rows=[CHAT], datasets=[{"path": "data.jsonl", "chat_template": "gemma3"}])
    with pytest.raises(StageError, match="chat_template: gemma3 is the template of Gemma-3"):
        kit.script("02_data").main(["run"])


def test_tools_and_arguments_of_the_template_come_from_rows_and_recipe(kit):
    jinja = "{{ mood }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + FLAT
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    kit.run(rows=[CHAT | {"tools": tools}, CHAT], chat_template=jinja, chat_template_kwargs={"mood": "calm "})
    assert [sample["text"].partition("user:")[0] for sample in kit.samples()] == ["calm [look]", "calm "]


def test_an_image_folder_with_metadata_is_a_data_set(kit):
    lines = [{"file_name": f"{colour}.png", "question": "Which?", "answer": colour} for colour in COLOURS[:3]]
    write_jsonl(Path("metadata.jsonl"), lines)
    kit.run(datasets=[{"path": "."}])
    assert [sample["media"][0]["path"] for sample in kit.samples()] == [f"{colour}.png" for colour in COLOURS[:3]]
    write_jsonl(Path("deep.jsonl"), [CHAT | {"image": "red.png"}])
    Path("far").mkdir()
    shutil.move("deep.jsonl", "far/deep.jsonl")
    kit.run(datasets=[{"path": "far/deep.jsonl", "media_root": "."}])
    assert kit.samples()[0]["media"][0]["path"] == "red.png"


@pytest.mark.parametrize("entry", [{"path": "far/rows.csv"}, {"path": "csv", "data_files": "far/rows.csv"}])
def test_the_pictures_of_a_csv_file_are_beside_it(entry, kit):
    Path("far").mkdir()
    shutil.move("red.png", "far/red.png")
    Path("far/rows.csv").write_text("image,question,answer\nred.png,Which?,red\n,And?,green\n", encoding="utf-8")
    kit.run(datasets=[entry])
    assert [[medium["path"] for medium in sample["media"]] for sample in kit.samples()] == [["far/red.png"], []]


def test_max_images_rejects_a_row_with_more(kit):
    rows = [CHAT | {"images": ["red.png"] * 2}, CHAT | {"images": ["red.png"] * 3}]
    kit.run("max_images=2", "on_bad_row=skip", rows=rows)
    assert [reject["reason"] for reject in kit.rejects()] == ["3 pictures, over max_images 2"]


# ---- bad input ----


@dataclass(frozen=True)
class BadData(Bad):
    """A row of the table: also 01's overrides, the base model's family, and what spoils it after 01."""

    overrides: tuple[str, ...] = ()
    base: str = "llava"
    spoil: Callable[[Path], None] | None = None


def bad(name: str, what: str, fix: str, files=None, *overrides: str, run="run", **more) -> BadData:
    """A row, with data.jsonl as it is unless `files` says otherwise."""
    return BadData(name, [run], what, fix, files or {}, overrides, **more)


def data(*rows: dict) -> dict[str, str]:
    """A data.jsonl: a good line, then these."""
    return {"data.jsonl": "".join(json.dumps(row) + "\n" for row in (CHAT, *rows))}


def without(name: str) -> Callable[[Path], None]:
    """What removes a file of the base model."""
    return lambda folder: (folder / name).unlink()


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def save_split(path: Path) -> None:
    datasets.DatasetDict(fit=datasets.Dataset.from_list([{"a": 1}])).save_to_disk(str(path.parent))


SKIP = "; or go without: on_bad_row=skip"
REPLACE = f"replace that picture, or remove the row{SKIP}"
MEND = f"mend or remove that line{SKIP}"
AGAIN = "write the file again; a cut download looks like this"
CELLS = 'save it as UTF-8, cells that hold a separator, newline or " within quotes'
WHOLE = "name a folder or hub id with whole tokenizer and processor files"
HOLD = "name a file of its own under test_datasets"
TOGETHER = "(those that share a picture stay together)"
CASES = (
    bad("a missing data file",
        "datasets: data.jsonl: no such file or folder",
        "correct the path (a relative one starts from the current folder)",
        {"data.jsonl": Path.unlink}),
    bad("an empty data file",
        "datasets: data.jsonl: holds no row",
        "name a file with rows, or remove it",
        {"data.jsonl": "\n\n"}),
    bad("an unknown suffix",
        "datasets: a.xlsx: unknown kind of file '.xlsx'",
        "use .json, .jsonl, .csv, .tsv, .parquet, .arrow or a folder written by datasets' save_to_disk",
        {"a.xlsx": "a,b\n"}, "datasets=[{path: a.xlsx}]"),
    bad("a CSV file that ends within quotes",
        "a.csv:3: not rows of cells: unexpected end of data", CELLS,
        {"a.csv": 'question,answer\n"What?,red\nWhat?,green\n'}, "datasets=[{path: a.csv}]"),
    bad("a CSV file in another encoding",
        "a.csv:1: not rows of cells: the text is not UTF-8", CELLS,
        {"a.csv": "question,answer\n".encode() + b"a" * 10_000 + b"\xe4,red\n"}, "datasets=[{path: a.csv}]"),
    bad("a CSV file with a column twice",
        "a.csv:1: not rows of cells: its first line names a column twice: question, image, image", CELLS,
        {"a.csv": "question,image,image\n"}, "datasets=[{path: a.csv}]"),
    bad("a CSV file without rows",
        "datasets: a.csv: holds no row", "name a file with rows, or remove it",
        {"a.csv": "question,answer\n"}, "datasets=[{path: a.csv}]"),
    bad("a row of too many cells",
        "a.csv: row 1: 3 cells, and the first line names 2 columns",
        f"put a cell that holds a separator within quotes, or write each empty cell{SKIP}",
        {"a.csv": "question,answer\nWhat?,red\nWhat, then?,red\n"}, "datasets=[{path: a.csv}]"),
    bad("a broken line",
        "data.jsonl:2: not JSON: Expecting ',' delimiter at column 31", MEND,
        {"data.jsonl": json.dumps(CHAT) + '\n{"messages": [{"role": "user" "content": "hi"}]}\n'}),
    bad("a line that is no UTF-8",
        "data.jsonl:2: not JSON: the text is not UTF-8", MEND,
        {"data.jsonl": json.dumps(CHAT).encode() + b'\n{"messages": "\xff"}\n'}),
    bad("a broken JSON file",
        "a.json:2: not JSON: Expecting value at column 1",
        "mend the file; one object per line belongs in a .jsonl file",
        {"a.json": "[1,\n]"}, "datasets=[{path: a.json}]"),
    bad("a JSON file that is no list",
        "a.json: holds an object, not a list of rows",
        "wrap the rows in [ ], or use one object per line in a .jsonl file",
        {"a.json": "{}"}, "datasets=[{path: a.json}]"),
    bad("a cut Parquet file",
        "a.parquet: not a readable parquet file (…)", AGAIN,
        {"a.parquet": b"PAR1 and no more"}, "datasets=[{path: a.parquet}]"),
    bad("a cut Arrow file",
        "a.arrow: not a readable arrow file (…)", AGAIN,
        {"a.arrow": b"ARROW1\0\0 and no more"}, "datasets=[{path: a.arrow}]"),
    bad("a folder that is no data set",
        "datasets: folder: can't be loaded: No (supported) data files found in folder",
        "correct path, name, revision, data_files or split; a hub id is owner/name",
        {"folder/a.xyz": "{}"}, "datasets=[{path: folder}]"),
    bad("a split that isn't there",
        "datasets: saved has the splits fit, not 'train'", "write split: fit",
        {"saved/x": save_split}, "datasets=[{path: saved, split: train}]"),
    bad("a missing picture",
        "data.jsonl:2: nope.png: no such file", REPLACE,
        data(CHAT | {"image": "nope.png"})),
    bad("a cut picture",
        "data.jsonl:2: red.png: not a readable picture (…)", REPLACE,
        data(CHAT | {"image": "red.png"}) | {"red.png": halved}),
    bad("a picture of zero bytes",
        "data.jsonl:2: red.png: empty file (0 bytes)", REPLACE,
        data(CHAT | {"image": "red.png"}) | {"red.png": b""}),
    bad("a picture that is none",
        "data.jsonl:2: red.png: not a picture (it starts with b'<html>')", REPLACE,
        data(CHAT | {"image": "red.png"}) | {"red.png": "<html>"}),
    bad("a picture behind a url",
        "data.jsonl:2: http://127.0.0.1:1/c: 127.0.0.1 is no public host; url_hosts can allow it", REPLACE,
        data(CHAT | {"image": "http://127.0.0.1:1/c"})),
    bad("a picture that the processor refuses",
        "data.jsonl:2: the processor refuses this row: absolute aspect ratio must be smaller than 200, "
        "got 300.0 (pictures: 300x1)",
        f"change the picture's size, or remove the row{SKIP}",
        data(CHAT | {"image": "a.png"}) | {"a.png": lambda path: Image.new("RGB", (300, 1)).save(path)},
        base="qwen2_5_vl"),
    bad("fewer placeholders than pictures",
        "data.jsonl:2: 1 image placeholder, but 2 listed pictures",
        'write one {"type": "image"} part for each entry of the image column' + SKIP,
        data(TYPED | {"images": ["red.png", "green.png"]})),
    bad("a picture for a model without",
        "data.jsonl:2: message 0 (user) has a picture, and base_model takes none",
        f"name a base_model that takes pictures, or remove the row{SKIP}",
        data(CHAT | {"image": "red.png"}), base="llama_text"),
    bad("a row with nothing to learn",
        "data.jsonl:2: nothing to learn: no assistant message has a text",
        f"write what the assistant should answer, or remove the row{SKIP}",
        data(OPEN)),
    bad("a typed placeholder",
        "data.jsonl:2: message 0 (user) spells the special token '<image>'",
        'remove it; a picture is a part {"type": "image"}, not a token in a text' + SKIP,
        data(chat("<image> What?"))),
    bad("an end of turn in a reply",
        "data.jsonl:2: message 1 (assistant) spells the special token '</s>'",
        'remove it; a picture is a part {"type": "image"}, not a token in a text' + SKIP,
        data(chat("What?", "red</s>"))),
    bad("a row in another shape",
        "data.jsonl:2: no list of messages under 'messages'; the row has conversations",
        f"write the conversation there, or name its key with field_messages{SKIP}",
        data({"conversations": []})),
    bad("a row that is too long",
        "data.jsonl:2: … tokens, over sequence_len 64",
        "sequence_len: 2048, or shorten the row; or go without: excess_length_strategy=drop",
        data(chat("What?", "red " * 500)), "sequence_len=64", "excess_length_strategy=error"),
    bad("nothing but bad rows",
        "data.jsonl:1: nothing to learn: no assistant message has a text (and 1 more bad row)",
        "write what the assistant should answer, or remove the row; "
        "all are in run/02_data.partial/rejects.jsonl",
        {"data.jsonl": 2 * (json.dumps(OPEN) + "\n")}, "on_bad_row=skip"),
    bad("all rows held out",
        f"val_set_size: 8: all of the 8 samples would be held out {TOGETHER}", f"val_set_size: 1, or {HOLD}", {},
        "val_set_size=8"),
    bad("a picture that most rows share",
        f"val_set_size: 1: none of the 5 samples would be held out {TOGETHER}", f"val_set_size: 2, or {HOLD}",
        {"data.jsonl": "".join(json.dumps(CHAT | {"image": f"{name}.png"}) + "\n"
                               for name in ("red", "green", "red", "green", "red"))}, "val_set_size=1"),
    bad("one picture in all rows",
        f"val_set_size: 1: none of the 2 samples would be held out {TOGETHER}", HOLD,
        {"data.jsonl": 2 * (json.dumps(CHAT | {"image": "red.png"}) + "\n")}, "val_set_size=1"),
    bad("a base model without config",
        "base_model: base: no usable config (…)", "…", spoil=without("config.json")),
    bad("a base model that is gone",
        "base_model: base is not whole in …, and HF_HUB_OFFLINE is set", "…", spoil=shutil.rmtree),
    bad("a processor without a chat template",
        "base_model: its LlavaProcessor has no chat template",
        "add chat_template: FILE.jinja to the recipe, or name an instruct model",
        spoil=without("chat_template.jinja")),
    bad("a cut tokenizer",
        "base_model: base: no processor could be loaded: Expecting property name …", WHOLE,
        spoil=lambda folder: halved(folder / "tokenizer.json")),
    bad("no tokenizer",
        "base_model: base: its Qwen2Tokenizer has no vocabulary",
        "name a checkpoint with a whole tokenizer.json",
        base="qwen2_5_vl", spoil=without("tokenizer.json")),
    bad("no processor",
        "base_model: base: no processor could be loaded: …", WHOLE, spoil=without("processor_config.json")),
    bad("an unknown processor class",
        "processor_type: transformers … has no class 'NoProcessor'",
        "leave processor_type out: it is found by itself",
        {}, "processor_type=NoProcessor"),
    bad("a processor option of a wrong type",
        "base_model: base: no processor could be loaded: Could not convert size input to size dict: x", WHOLE,
        {}, "processor_kwargs={size: x}"),
    bad("a template that is no Jinja",
        "chat_template: line 2: Expected an expression, got 'end of statement block'",
        "mend the template",
        {}, "chat_template={{ messages }}\n{% if %}"),
    bad("a template that drops the question",
        "data.jsonl:1: the chat template drops or changes this text: 'What is it?'",
        "name a chat_template that renders every message as it stands",
        data(), "chat_template=" + FLAT.replace("messages", "messages[1:]")),
    bad("a run without a configuration",
        "other/01_config is not there: 01_config has not finished",
        "run first: python 01_config.py RECIPE other",
        {"other/x": ""}, run="other"),
)


@bad_input(CASES)
def test_bad_input_is_a_two_line_error_and_nothing_is_lost(case, kit):
    shutil.copytree(kit.zoo(case.base), "base")
    for name, content in case.files.items():  # 01 looks whether the files are there
        if not Path(name).exists():
            harness.write(kit.folder, {name: content})
    kit.configure(*case.overrides, base_model="base")
    if case.spoil:
        case.spoil(Path("base"))
    left = "run/02_data.partial"
    harness.check(case, "02_data", kit.folder, may_write=(f"{left}/*", f"{left}/processor/*", "run/media/*"))

"""02_data: the same samples from any file, everything counted, nothing lost, and the same bytes from the same rows."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lib import samples
from lib.messages import RowError, normalise
from lib.stage import StageError
from tests import harness
from tests.conftest import COLOURS, write_colours
from tests.harness import Bad, bad_input

ASKED = [{"role": "user", "content": "What is it?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "red"}]
TYPED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ANSWERED[1]]


@pytest.fixture
def kit(tmp_path, monkeypatch, zoo, script):
    """A Kit in a folder of its own, which is the current one, with the data set of colours."""
    monkeypatch.chdir(tmp_path)
    write_colours(tmp_path)
    return Kit(tmp_path, zoo, script)


@dataclass
class Kit:
    """Runs the first two stages; a run's outputs are then in self.out."""
    folder: Path
    zoo: object
    script: object
    out: Path = Path("run/02_data")

    def configure(self, *overrides: str, rows: list | None = None, base: str = "llava", **knobs) -> None:
        """01_config on a recipe for data.jsonl, which holds `rows` where they are given."""
        if rows is not None:
            write_jsonl(Path("data.jsonl"), rows)
        recipe = {"base_model": str(self.zoo(base)), "datasets": [{"path": "data.jsonl"}], "adapter": "lora"} | knobs
        Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
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
        return [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]

    def counts(self) -> dict:
        """What report.json counts."""
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))["counts"]


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the same samples from any file ----


def as_json(rows, path):
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    return ".json"


def as_jsonl(rows, path):
    path.with_suffix(".jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return ".jsonl"


def as_parquet(rows, path):
    datasets.Dataset.from_list(rows).to_parquet(str(path.with_suffix(".parquet")))
    return ".parquet"


def as_arrow_stream(rows, path):
    datasets.Dataset.from_list(rows).save_to_disk(str(path / "saved"))
    shutil.copy(next((path / "saved").glob("*.arrow")), path.with_suffix(".arrow"))
    shutil.rmtree(path / "saved")
    return ".arrow"


def as_arrow_file(rows, path):
    import pyarrow
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as file:
        file.write_table(table, max_chunksize=3)
    return ".arrow"


def as_saved_dataset(rows, path):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return ""


def as_saved_split(rows, path):
    other = datasets.Dataset.from_list(rows[:1])
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=other).save_to_disk(str(path))
    return ""


@pytest.mark.parametrize("write", [as_json, as_jsonl, as_parquet, as_arrow_stream, as_arrow_file, as_saved_dataset, as_saved_split],
                         ids=lambda write: write.__name__)
def test_any_kind_of_file_gives_the_samples_that_its_rows_describe(write, kit):
    rows = read_jsonl(Path("data.jsonl"))
    for row in rows:  # the saved folder is another one than the pictures', so that paths have to be absolute
        row["images"] = [str(kit.folder / row["images"][0])]
    Path("data.jsonl").unlink()
    kit.run(datasets=[{"path": "data" + write(rows, Path("data").absolute()), "split": "train"}])
    found = kit.samples()
    assert [sample["sample_id"] for sample in found] == [f"data-{number}" for number in range(len(COLOURS))]
    for sample, colour in zip(found, COLOURS):
        text = f"USER: <image>\nWhich colour is it? ASSISTANT: {colour}</s>"
        assert sample["text"] == text
        assert [text[span["start"]:span["end"]] for span in sample["spans"]] == [f" {colour}</s>"]
        assert [medium["path"] for medium in sample["media"]] == [str(kit.folder / f"{colour}.png")]


def test_a_saved_data_set_of_pictures_keeps_their_bytes(kit):
    rows = {"messages": [ANSWERED] * 2, "image": ["red.png", "green.png"]}
    features = datasets.Dataset.from_dict(rows).features | {"image": datasets.Image()}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk("saved")
    kit.run(datasets=[{"path": "saved"}])
    assert [sample["media"][0]["bytes"] for sample in kit.samples()] == [Path(f"{c}.png").read_bytes() for c in ("red", "green")]


# ---- the columns of pictures ----

PNG = b"bytes of a picture"


@pytest.mark.parametrize("row, pictures", [
    ({}, []),
    ({"images": None}, []),
    ({"images": []}, []),
    ({"image": None, "images": []}, []),
    ({"image": "a.png"}, ["a.png"]),
    ({"images": "a.png"}, ["a.png"]),
    ({"images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
    ({"image": {"bytes": PNG, "path": None}}, [{"bytes": PNG, "path": None}]),
    ({"images": [{"bytes": None, "path": "a.png"}]}, [{"bytes": None, "path": "a.png"}]),
])
def test_an_image_column_holds_one_picture_several_none_or_null(row, pictures):
    messages, found = normalise({"messages": ANSWERED} | row)
    assert found == pictures
    assert [part["type"] for part in messages[0]["content"]] == ["image"] * len(pictures) + ["text"]


def test_a_pil_image_is_a_picture():
    image = Image.new("RGB", (1, 1))
    assert normalise({"messages": ANSWERED, "image": image})[1] == [image]


def test_listed_pictures_go_before_the_first_user_text_where_no_placeholder_is():
    messages, _ = normalise({"messages": [{"role": "system", "content": "a"}, *ANSWERED], "images": ["a.png", "b.png"]})
    assert [[part["type"] for part in message["content"]] for message in messages] == [["text"], ["image", "image", "text"], ["text"]]


def test_listed_pictures_fill_the_placeholders_of_all_turns_in_order():
    inline = {"role": "user", "content": [{"type": "image", "path": "b.png", "text": None}, {"type": "image"}]}
    messages, pictures = normalise({"messages": [*TYPED, inline], "images": ["a.png", "c.png"]})
    assert pictures == ["a.png", "b.png", "c.png"]
    assert messages[2]["content"] == [{"type": "image"}, {"type": "image"}]


@pytest.mark.parametrize("part, source", [
    ({"path": "a.png"}, "a.png"), ({"image": "a.png"}, "a.png"), ({"url": "a.png"}, "a.png"), ({"bytes": PNG}, PNG),
    ({"base64": "aGk="}, "data:;base64,aGk="),
])
def test_a_part_names_its_picture_in_any_usual_way(part, source):
    row = {"messages": [{"role": "user", "content": [{"type": "image", **part}]}, ANSWERED[1]]}
    assert normalise(row)[1] == [source]


@pytest.mark.parametrize("row, reason", [
    (3, "a row must be an object, not a number"),
    ({"text": "a"}, "no list of messages under 'messages'; the row has text"),
    ({"messages": []}, "no list of messages under 'messages'; the row has messages"),
    ({"messages": ["hi"]}, "message 0 is a text, not an object"),
    ({"messages": [{"from": "human", "value": "hi"}]}, "message 0 has the role None"),
    ({"messages": [{"role": "bot", "content": "hi"}]}, "message 0 has the role 'bot'"),
    ({"messages": [{"role": "user"}]}, "message 0 (user) has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 0 has a text part without a text"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "message 0 has a part of type 'video'"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "message 0 has a part of type 'a text'"),
    ({"messages": [{"role": "user", "content": "\ud83d hi"}]}, "message 0 (user) holds half a surrogate pair, which is no character"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
     "message 1 (assistant) has 'tool_calls', which isn't rendered yet"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "a", "train": False}]},
     "message 1 (assistant) has 'train', which isn't rendered yet"),
    ({"messages": ANSWERED, "tools": [{}]}, "the row has tools, which aren't rendered yet"),
    ({"messages": TYPED}, "1 image placeholder, but 0 listed pictures"),
    ({"messages": TYPED, "images": ["a.png", "b.png"]}, "1 image placeholder, but 2 listed pictures"),
    ({"messages": [ANSWERED[1]], "image": "a.png"}, "1 picture, but no user message to stand in"),
])
def test_a_row_that_is_no_conversation_is_rejected_with_the_reason(row, reason):
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert caught.value.reason == reason and caught.value.fix


def test_another_column_may_hold_the_conversation():
    assert normalise({"chat": ANSWERED}, "chat") == normalise({"messages": ANSWERED})


def test_a_null_key_of_a_message_is_no_key():  # a Parquet file gives every message the keys of all
    assert normalise({"messages": [message | {"tool_calls": None} for message in ANSWERED]}) == normalise({"messages": ANSWERED})


def anything(choose: random.Random, depth: int = 0):
    """A random JSON value, often of the shapes that rows have."""
    plain = [None, True, 0, -1.5, "", "hi", "\ud800", "a.png", "user", "assistant", "image", "text", "<image>"]
    if depth > 4 or choose.random() < 0.3:
        return choose.choice(plain)
    if choose.random() < 0.5:
        return [anything(choose, depth + 1) for _ in range(choose.randrange(4))]
    keys = ("messages", "role", "content", "type", "text", "image", "images", "path", "bytes", "base64", "tools", "\udfff", "")
    return {key: anything(choose, depth + 1) for key in choose.sample(keys, choose.randrange(6))}


def likely(choose: random.Random):
    """A conversation in which anything may be wrong."""
    def part():
        return choose.choice([{"type": "image"}, {"type": "text", "text": "hi"}, {"type": "image", "path": "a.png"}, anything(choose, 3)])

    def message():
        content = choose.choice(["hi", [part() for _ in range(choose.randrange(3))], anything(choose, 3)])
        return choose.choice([{"role": choose.choice(["user", "assistant", "system"]), "content": content}, anything(choose, 2)])
    row = {"messages": [message() for _ in range(choose.randrange(4))], "images": choose.choice([[], ["a.png"], anything(choose, 3)])}
    return {key: value for key, value in row.items() if choose.random() < 0.95}


def test_any_json_value_is_a_row_or_a_row_error():
    choose, kept = random.Random(7), 0
    for number in range(20_000):
        row = likely(choose) if number % 2 else anything(choose)
        try:
            messages, pictures = normalise(json.loads(json.dumps(row)))
        except RowError as error:
            assert "\n" not in error.reason + error.fix and (error.reason + error.fix).encode("utf-8")
            continue
        kept += 1
        parts = [part for message in messages for part in message["content"]]
        assert len(pictures) == sum(part == {"type": "image"} for part in parts)
        assert all(part == {"type": "image"} or part.keys() == {"type", "text"} for part in parts)
    assert kept > 500  # the fuzz isn't all garbage


# ---- what is kept, dropped and held out ----


def test_all_bad_rows_are_listed_with_row_and_reason_and_the_others_kept(kit):
    rows = [{"messages": ANSWERED}, {"messages": ASKED}, {"messages": TYPED}, {"messages": ANSWERED, "image": "nope.png"},
            {"messages": TYPED, "image": "red.png"}]
    kit.run("on_bad_row=skip", rows=rows)
    assert [(reject["dataset"], reject["row"], reject["where"], reject["reason"]) for reject in kit.rejects()] == [
        ("data.jsonl", 1, "data.jsonl:2", "nothing to learn: no assistant message has a text"),
        ("data.jsonl", 2, "data.jsonl:3", "1 image placeholder, but 0 listed pictures"),
        ("data.jsonl", 3, "data.jsonl:4", "nope.png: no such file")]
    assert [sample["row"] for sample in kit.samples()] == [0, 4]
    assert kit.counts()["rejected_rows"] == 3


def test_with_on_bad_row_error_all_rows_are_looked_at_before_it_stops(kit):
    with pytest.raises(StageError) as caught:
        kit.run(rows=[{"messages": ASKED}, {"messages": ANSWERED}, 3])
    assert caught.value.what == "data.jsonl:1: nothing to learn: no assistant message has a text (and 1 more bad row)"
    assert caught.value.fix.endswith("; all are in run/02_data.partial/rejects.jsonl; or go without: on_bad_row=skip")
    assert [reject["row"] for reject in kit.rejects()] == [0, 2]


def test_a_sample_over_sequence_len_is_dropped_with_its_length(kit):
    kit.run("on_bad_row=skip", "sequence_len=60", rows=[{"messages": ANSWERED}, {"messages": ANSWERED, "images": ["red.png"] * 3}])
    assert [sample["row"] for sample in kit.samples()] == [0]
    (reject,) = kit.rejects()
    assert reject["row"] == 1 and reject["reason"].endswith(" tokens, over sequence_len 60")


def test_lengths_are_those_of_the_encoded_sample(kit):
    kit.run(rows=[{"messages": ANSWERED, "images": ["red.png", "green.png"]}])
    (sample,) = kit.samples()
    row = read_jsonl(kit.out / "preview.jsonl")[0]
    assert sample["input_tokens"] == len(row["input_ids"])
    assert sample["media_tokens"] == row["media_tokens"] == row["tokens"].count("<image>") == 2 * 16
    assert sample["supervised_tokens"] == sum(label != -100 for label in row["labels"]) == len("▁ re d </s>".split())


def test_held_out_samples_are_a_seeded_choice(kit):
    def held_out(*overrides):
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


def test_test_datasets_are_held_out_and_their_samples_have_names_of_their_own(kit):
    write_colours(Path("other"), rows=2)
    kit.run(test_datasets=[{"path": "other/data.jsonl"}])
    assert len(kit.samples()) == len(COLOURS)
    assert [sample["sample_id"] for sample in kit.samples("eval")] == ["data.2-0", "data.2-1"]
    assert [sample["media"][0]["path"] for sample in kit.samples("eval")] == ["other/red.png", "other/green.png"]


def sample(row: int, *pictures: str) -> dict:
    return {"dataset": "d", "row": row, "media": [{"sha256": picture} for picture in pictures]}


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_share_a_picture_or_a_row_stay_on_one_side(seed):
    every = [sample(0, "a"), sample(0), sample(1, "a", "b"), sample(2, "b"), sample(3, "c"), sample(4), sample(5), sample(6, "c"),
             sample(7, "d"), sample(8, "d", "e")]
    together = [{0, 1, 2, 3}, {4, 7}, {5}, {6}, {8, 9}]
    for size in (1, 3, 5, 0.3, 0.9):
        train, held_out = samples.hold_out(every, size, seed)
        places = {place for place, one in enumerate(every) if any(one is other for other in held_out)}
        assert len(train) + len(held_out) == len(every)
        assert places == set().union(*(group for group in together if group & places))
        assert 1 <= len(held_out) <= (size if size >= 1 else round(size * len(every)))


def test_a_chain_of_ten_thousand_shared_pictures_is_one_group_at_once():
    chain = [sample(number, f"{number}", f"{number + 1}") for number in range(10_000)]
    assert len(samples.groups_of(chain)) == 1


# ---- what it writes ----


def test_the_preview_holds_the_first_sixteen_kept_rows_as_training_sees_them(kit):
    good = [{"messages": [ASKED[0], {"role": "assistant", "content": f"red {n}"}], "images": ["red.png"]} for n in range(18)]
    kit.run("on_bad_row=skip", rows=[{"messages": ASKED}, *good])
    preview = read_jsonl(kit.out / "preview.jsonl")
    assert [row["row"] for row in preview] == list(range(1, 17))
    for row in preview:
        assert list(row) == ["sample_id", "row", "dataset", "input_ids", "labels", "tokens", "images", "media_tokens"]
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["tokens"])
        assert (row["images"], row["media_tokens"]) == (1, 16)
        trained = [token for token, label in zip(row["tokens"], row["labels"]) if label != -100]
        assert "".join(trained) == f"▁red▁{row['row'] - 1}</s>"
        assert all(label in (-100, token_id) for label, token_id in zip(row["labels"], row["input_ids"]))


def test_the_page_shows_the_pictures_and_every_token(kit):
    kit.run()
    page = (kit.out / "preview.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(COLOURS)
    assert all(f"data-{number}" in page for number in range(len(COLOURS)))
    assert page.count("<mark>") >= len(COLOURS) and "http" not in page.replace("http-equiv", "")


def test_two_runs_write_the_same_bytes(kit):
    def outputs():
        ledger = json.loads((kit.out / "stage.json").read_text(encoding="utf-8"))
        return {file: stamp["sha256"] for file, stamp in ledger["wrote"].items()}
    kit.configure("val_set_size=2", "on_bad_row=skip", rows=[*read_jsonl(Path("data.jsonl")), {"messages": ASKED}, 3,
                                                             {"messages": ANSWERED, "image": "data.jsonl"}])
    kit.script("02_data").main(["run"])
    first = outputs()
    kit.script("02_data").main(["run", "--force"])
    assert outputs() == first
    assert {"report.json", "rejects.jsonl", "preview.html", "preview.jsonl", "train/state.json", "eval/state.json",
            "processor/tokenizer.json", "processor/encoder.json"} <= first.keys()


def test_the_saved_processor_makes_the_same_tensors_as_the_one_measured_with(kit):
    from lib.chat import Encoder
    kit.run(base="qwen2_5_vl", processor_kwargs={"max_pixels": 2048, "min_pixels": 256}, chat_template="own.jinja"
            if Path("own.jinja").write_text("{% for m in messages %}{% for p in m.content %}{{ '<|image_pad|>' if p.type == 'image' "
                                            "else p.text }}{% endfor %}<|im_end|>{% endfor %}") else None)
    encoder = Encoder.load(kit.out / "processor")
    for one in kit.samples():
        encoded = encoder(one)
        assert encoded["input_ids"].shape[1] == one["input_tokens"]
        assert one["media_tokens"] <= 2048 / 16**2
        assert one["text"].startswith("<|image_pad|>Which")


def test_a_changed_picture_or_a_new_template_runs_the_stage_again(kit, capsys):
    def runs() -> bool:
        kit.script("02_data").main(["run"])
        return "is up to date" not in capsys.readouterr().out
    Path("own.jinja").write_text("{% for m in messages %}{{ m.content[0].text or '<image>' }}</s>{% endfor %}", encoding="utf-8")
    Path("bad.png").write_bytes(b"")
    rows = [{"messages": ANSWERED}, {"messages": ANSWERED, "image": "bad.png"}]
    kit.configure("on_bad_row=skip", rows=rows, chat_template="own.jinja")
    assert runs() and not runs()
    shutil.copy("red.png", "bad.png")  # a rejected row's picture was read as well
    assert runs() and not runs()
    Path("own.jinja").write_text("{% for m in messages %}{{ m.content[0].text or '<image>' }}.</s>{% endfor %}", encoding="utf-8")
    assert runs() and not runs()


def test_show_prints_samples_and_writes_nothing(kit, capsys):
    kit.run()
    before = harness.contents(kit.folder)
    capsys.readouterr()
    kit.script("02_data").main(["run", "--show", "99"])
    shown = capsys.readouterr().out
    assert all(f"data-{number}: " in shown and f"ASSISTANT: {colour}</s>" in shown for number, colour in enumerate(COLOURS))
    assert harness.contents(kit.folder) == before


@pytest.mark.parametrize("base", ["qwen2_5_vl", "gemma3", "smolvlm2", "llama_text", "qwen3_vl"])
def test_every_family_gives_samples(base, kit):
    kit.run(base=base, rows=[{"messages": ANSWERED} | ({} if base == "llama_text" else {"image": "red.png"})])
    (one,) = kit.samples()
    assert one["supervised_tokens"] >= 2 and (one["media_tokens"] > 0) == (base != "llama_text")


def test_a_template_that_rewrites_history_gives_a_sample_for_each_reply(kit):
    chat = [*ANSWERED, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
    jinja = "{% for m in messages %}{{ m.role }}:{{ '(last)' if loop.last and m.role == 'assistant' }}{% for p in m.content %}" \
        "{{ p.text or '<image>' }}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    kit.run(rows=[{"messages": chat, "image": "red.png"}], chat_template=jinja)
    assert [(one["sample_id"], one["text"], len(one["media"])) for one in kit.samples()] == [
        ("data-0", "user:<image>What is it?</s>assistant:red</s>user:Sure?</s>assistant:(last)yes</s>", 1),
        ("data-0.1", "user:<image>What is it?</s>assistant:(last)red</s>", 1)]


# ---- bad input ----

JINJA = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}</s>{% endfor %}"
ROW = json.dumps({"messages": ANSWERED}) + "\n"
OF_ONE = "; or go without: on_bad_row=skip"


def row_with(**keys) -> str:
    """A good line, and one whose row has these keys."""
    return ROW + json.dumps({"messages": ANSWERED} | keys) + "\n"


def chat_of(*messages: dict) -> str:
    """A good line, and one with these messages."""
    return ROW + json.dumps({"messages": messages}) + "\n"


def remove(*names: str):
    """What removes a base model's files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str):
    """What cuts a base model's file in half."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:len((folder / name).read_bytes()) // 2])


@dataclass(frozen=True)
class BadData(Bad):
    """A row of the table: also 01's overrides, the base model's family, and what happens to it between 01 and 02."""
    overrides: tuple[str, ...] = ()
    base: str = "llava"
    spoil: Callable[[Path], None] | None = None


def bad(name: str, what: str, fix: str, files: dict | None = None, overrides=(), base="llava", spoil=None, run="run") -> BadData:
    return BadData(name, [run], what, fix, files or {}, tuple(overrides), base, spoil)


NO_FILE = "correct the path (a relative one starts from the current folder)"
REPLACE = f"replace that picture, or remove the row{OF_ONE}"
CASES = (
    bad("a missing data file", "datasets: data.jsonl: no such file or folder", NO_FILE, {"data.jsonl": Path.unlink}),
    bad("an empty data file", "datasets: data.jsonl: holds no row", "name a file with rows, or remove it", {"data.jsonl": "\n\n"}),
    bad("an unknown suffix", "datasets: data.csv: unknown kind of file '.csv'",
        "use .json, .jsonl, .parquet, .arrow or a folder written by datasets' save_to_disk", {"data.csv": "a,b\n"},
        ["datasets=[{path: data.csv}]"]),
    bad("a broken line", "data.jsonl:2: not JSON: Expecting ',' delimiter at column 31", f"mend or remove that line{OF_ONE}",
        {"data.jsonl": ROW + '{"messages": [{"role": "user" "content": "hi"}]}\n'}),
    bad("a line that is no UTF-8", "data.jsonl:2: not JSON: the text is not UTF-8", f"mend or remove that line{OF_ONE}",
        {"data.jsonl": ROW.encode() + b'{"messages": "\xff"}\n'}),
    bad("a broken JSON file", "data.json:2: not JSON: Expecting value at column 1",
        "mend the file; one object per line belongs in a .jsonl file", {"data.json": "[1,\n]"}, ["datasets=[{path: data.json}]"]),
    bad("a JSON file that is no list", "data.json: holds an object, not a list of rows",
        "wrap the rows in [ ], or use one object per line in a .jsonl file", {"data.json": "{}"}, ["datasets=[{path: data.json}]"]),
    bad("a cut Parquet file", "data.parquet: not a readable parquet file (…)",
        "write the file again; a cut download looks like this", {"data.parquet": b"PAR1 and no more"},
        ["datasets=[{path: data.parquet}]"]),
    bad("a cut Arrow file", "data.arrow: not a readable arrow file (…)",
        "write the file again; a cut download looks like this", {"data.arrow": b"ARROW1\0\0 and no more"},
        ["datasets=[{path: data.arrow}]"]),
    bad("a folder that is no data set", "datasets: folder is a folder, but not one written by datasets' save_to_disk",
        "name the data file in it, or write the folder with save_to_disk", {"folder/data.jsonl": ROW}, ["datasets=[{path: folder}]"]),
    bad("a split that isn't there", "datasets: saved has the splits fit, not 'train'", "write split: fit",
        {"saved/x": lambda path: datasets.DatasetDict(fit=datasets.Dataset.from_list([{"a": 1}])).save_to_disk(str(path.parent))},
        ["datasets=[{path: saved, split: train}]"]),
    bad("a missing picture", "data.jsonl:2: nope.png: no such file", REPLACE, {"data.jsonl": row_with(image="nope.png")}),
    bad("a cut picture", "data.jsonl:2: red.png: not a readable picture (…)", REPLACE,
        {"data.jsonl": row_with(image="red.png"), "red.png": lambda path: path.write_bytes(path.read_bytes()[:60])}),
    bad("a picture of zero bytes", "data.jsonl:2: red.png: empty file (0 bytes)", REPLACE,
        {"data.jsonl": row_with(image="red.png"), "red.png": b""}),
    bad("a picture that is none", "data.jsonl:2: red.png: not a picture (it starts with b'<html>')", REPLACE,
        {"data.jsonl": row_with(image="red.png"), "red.png": "<html>"}),
    bad("a picture behind a url", "data.jsonl:2: https://example.org/a.png: pictures behind urls are not fetched; download it "
        "and give the path", REPLACE, {"data.jsonl": row_with(image="https://example.org/a.png")}),
    bad("a picture that the processor refuses", "data.jsonl:2: the processor refuses this row: absolute aspect ratio must be smaller "
        "than 200, got 300.0 (pictures: 300x1)", f"change the picture's size, or remove the row{OF_ONE}",
        {"data.jsonl": row_with(image="a.png"), "a.png": lambda path: Image.new("RGB", (300, 1)).save(path)}, base="qwen2_5_vl"),
    bad("fewer placeholders than pictures", "data.jsonl:2: 1 image placeholder, but 2 listed pictures",
        'write one {"type": "image"} part for each entry of the image column' + OF_ONE,
        {"data.jsonl": ROW + json.dumps({"messages": TYPED, "images": ["red.png", "green.png"]})}),
    bad("a picture for a model without", "data.jsonl:2: message 0 (user) has an image, and base_model takes none",
        f"name a base_model that takes images, or remove them from the row{OF_ONE}",
        {"data.jsonl": row_with(image="red.png")}, base="llama_text"),
    bad("a row with nothing to learn", "data.jsonl:2: nothing to learn: no assistant message has a text",
        f"write what the assistant should answer, or remove the row{OF_ONE}", {"data.jsonl": chat_of(*ASKED)}),
    bad("a typed placeholder", "data.jsonl:2: message 0 (user) spells the special token '<image>'",
        'remove it from the text; a picture is a part {"type": "image"}, not a token in a text' + OF_ONE,
        {"data.jsonl": chat_of({"role": "user", "content": "<image> What?"}, ANSWERED[1])}),
    bad("a row in another shape", "data.jsonl:2: no list of messages under 'messages'; the row has conversations",
        f"write the conversation there, or name its key with field_messages{OF_ONE}",
        {"data.jsonl": ROW + '{"conversations": []}'}),
    bad("a row that is too long", "data.jsonl:2: … tokens, over sequence_len 64",
        f"raise sequence_len, shorten the row, or use smaller pictures{OF_ONE}",
        {"data.jsonl": chat_of(ASKED[0], {"role": "assistant", "content": "red " * 500})}, ["sequence_len=64"]),
    bad("nothing but bad rows", "data.jsonl:1: nothing to learn: no assistant message has a text (and 1 more bad row)",
        "write what the assistant should answer, or remove the row; all are in run/02_data.partial/rejects.jsonl",
        {"data.jsonl": 2 * (json.dumps({"messages": ASKED}) + "\n")}, ["on_bad_row=skip"]),
    bad("all rows held out", "val_set_size: 8: all of the 8 samples would be held out (those that share a picture stay together)",
        "change val_set_size, or name a file of its own under test_datasets", {}, ["val_set_size=8"]),
    bad("one picture in all rows", "val_set_size: 1: none of the 2 samples would be held out (those that share a picture stay together)",
        "change val_set_size, or name a file of its own under test_datasets",
        {"data.jsonl": 2 * (json.dumps({"messages": ANSWERED, "image": "red.png"}) + "\n")}, ["val_set_size=1"]),
    bad("a base model without config", "base_model: base: no usable config (…)", "…", spoil=remove("config.json")),
    bad("a base model that is gone", "base_model: base: no usable config (…)", "…", spoil=shutil.rmtree),
    bad("a processor without a chat template", "base_model: its LlavaProcessor has no chat template",
        "add chat_template: FILE.jinja to the recipe, or name an instruction-tuned checkpoint", spoil=remove("chat_template.jinja")),
    bad("a cut tokenizer", "base_model: base: no processor could be loaded: Expecting property name …",
        "name a folder or hub id with whole tokenizer and processor files", spoil=cut("tokenizer.json")),
    bad("no tokenizer", "base_model: base: its Qwen2Tokenizer has no vocabulary", "name a checkpoint with a whole tokenizer.json",
        base="qwen2_5_vl", spoil=remove("tokenizer.json")),
    bad("no processor", "base_model: base: no processor could be loaded: …",
        "name a folder or hub id with whole tokenizer and processor files", spoil=remove("processor_config.json")),
    bad("an unknown processor class", "processor_type: transformers … has no class 'NoProcessor'",
        "leave processor_type out: it is found by itself", {}, ["processor_type=NoProcessor"]),
    bad("a processor option of a wrong type", "base_model: base: no processor could be loaded: Could not convert size input to size "
        "dict: x", "name a folder or hub id with whole tokenizer and processor files", {}, ["processor_kwargs={size: x}"]),
    bad("a template that is no Jinja", "chat_template: line 2: Expected an expression, got 'end of statement block'",
        "mend the template", {}, ["chat_template={{ messages }}\n{% if %}"]),
    bad("a template that drops the question", "data.jsonl:1: the chat template drops or changes this text: 'What is it?'",
        "name a chat_template that renders every message as it stands",
        {"data.jsonl": ROW}, ["chat_template=" + JINJA.replace("messages", "messages[1:]")]),
    bad("a run without a configuration", "other/01_config is not there: 01_config has not finished",
        "run first: python 01_config.py RECIPE other", {"other/x": ""}, run="other"),
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
    harness.check(case, "02_data", kit.folder, may_write=("run/02_data.partial/*", "run/02_data.partial/processor/*"))

"""The knobs chat_template and template_date through the scripts: whose template it is, which day it tells."""

import json

import datasets
import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from lib import registry
from lib.config import kept, paths
from lib.evaluation import predict
from lib.export import fresh, proof
from lib.run import ledger, stage
from lib.run.errors import StageError
from lib.text.chat import Encoder
from tests.runner import Run, text_rows

CLOCK = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}"
CHATML = CLOCK + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '' + m.content }}<|im_end|>\n" \
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def on_day(monkeypatch):
    """A function: an ISO date -> from now on it is this day, for 01 and for chat templates."""
    def on_day(day: str):
        class Today(kept.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        class Clock(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(kept, "date", Today)
        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return on_day


@pytest.fixture
def run(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run on a text-only checkpoint whose template tells the day."""
    def run(base: str = "qwen_text", **knobs) -> Run:
        return Run(tmp_path, monkeypatch, zoo(base), text_rows(), **{"chat_template": CHATML} | knobs)
    return run


def texts_of(run: Run) -> list[str]:
    """The texts of all samples to train on."""
    return datasets.load_from_disk(str(run.path / "02_data" / "train"))["text"]


def saved_template(run: Run) -> str:
    """The chat template that later stages and users of an export get."""
    return (run.path / "02_data" / "processor" / "chat_template.jinja").read_text(encoding="utf-8")


def test_02_writes_the_same_samples_on_any_day(run, on_day, capsys):
    on_day("2026-07-14")
    first = run().upto("02_data")
    wrote = ledger.digest(first.path / "02_data")
    on_day("2027-08-15")
    capsys.readouterr()
    first.upto("02_data")
    assert "02_data is up to date" in capsys.readouterr().out
    first("02_data", "--force")
    assert ledger.digest(first.path / "02_data") == wrote
    assert all(text.startswith("Today is 14 Jul 2026.<|im_start|>") for text in texts_of(first))


def test_a_run_keeps_its_first_day_when_01_runs_again(run, on_day):
    on_day("2026-07-14")
    first = run().upto("01_config")
    assert first.json("01_config/config.json")["template_date"] == "2026-07-14"
    on_day("2026-07-15")
    first("01_config", "save_total_limit=9")
    assert first.json("01_config/config.json")["template_date"] == "2026-07-14"
    first("01_config", "template_date=2020-02-29")
    assert first.json("01_config/config.json")["template_date"] == "2020-02-29"


def test_02_reports_what_the_template_says_by_itself_and_in_how_many_rows(run, capsys):
    first = run(template_date="2026-07-14").upto("02_data")
    report = first.json("02_data/report.json")
    assert report["counts"]["rows_that_tell_the_day"] == 9
    assert report["template_says"] == [{"words": "Today is 14 Jul 2026.", "rows": 9}]
    printed = capsys.readouterr().out
    assert "what the chat template says by itself" in printed and "Today is 14 Jul 2026." in printed


def test_a_template_without_a_clock_tells_no_day(run):
    first = run(chat_template=CHATML.removeprefix(CLOCK)).upto("02_data")
    report = first.json("02_data/report.json")
    assert report["counts"]["rows_that_tell_the_day"] == 0 and report["template_says"] == []


def test_an_export_renders_on_any_day_as_training_did_and_02_keeps_the_clock(run, on_day, monkeypatch):
    first = run(template_date="2026-07-14", merge=True, max_steps=1).upto("05_train")
    monkeypatch.setattr(fresh.subprocess, "run", lambda command, **_: proof.main(*map(str, command[-2:])))
    first("06_save")
    assert saved_template(first) == CHATML
    (sample, *_) = datasets.load_from_disk(str(first.path / "02_data" / "train"))
    messages = [{**message, "content": message["content"][0]["text"]} for message in json.loads(sample["messages"])]
    for folder in (first.path / "06_save" / kind for kind in ("adapter", "merged")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for day in ("2027-08-15", "2028-02-29"):
            on_day(day)
            assert tokenizer.apply_chat_template(messages, tokenize=False) == sample["text"]
        line, _, own = (folder / "chat_template.jinja").read_text(encoding="utf-8").partition("\n")
        assert line.startswith("{% macro strftime_now(format) %}") and own == CHATML
        assert "2026-07-14 on any day" in (folder / "README.md").read_text(encoding="utf-8")


# ---- a template of a data set ----

COLON = ("{% for m in messages %}<|im_start|>{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}"
         "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")


@pytest.mark.parametrize("own, start", [("colon.jinja", "<|im_start|>user: "), ("tokenizer_default", "<|im_start|>user\n")])
def test_the_first_data_sets_own_template_asks_and_is_saved(own, start, run):
    first = run(chat_template=CHATML)
    (first.folder / "colon.jinja").write_text(COLON, encoding="utf-8")
    recipe = first.folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("{path: rows.jsonl}", f"{{path: rows.jsonl, chat_template: {own}}}"), encoding="utf-8")
    first.upto("02_data")
    assert all(start in text for text in texts_of(first))
    encoder = Encoder.load(first.path / "02_data/processor")
    (sample, *_) = predict.read("rows.jsonl", stage.view("02_data", first.path, own=True), encoder)
    assert sample["text"].startswith(texts_of(first)[0][:len(start)]) and start in encoder.prompt(sample)[0]


# ---- a template by its name ----


def test_a_familys_name_means_the_checkpoints_own_template(run, zoo, capsys):
    first = run("qwen2_5_vl", chat_template="qwen2_vl").upto("02_data")
    assert saved_template(first) == (zoo("qwen2_5_vl") / "chat_template.jinja").read_text(encoding="utf-8")
    assert "chat_template: qwen2_vl means the checkpoint's own" in capsys.readouterr().out


@pytest.mark.parametrize("base, name, owners, family", [
    ("llava", "qwen2_vl", "Qwen2-VL and Qwen2.5-VL and Qwen3-VL", "LLaVA-1.5 and Pixtral"),
    ("qwen_text", "gemma3", "Gemma-3", "generic (qwen3)"),
])
def test_another_familys_name_is_refused_with_a_fix(base, name, owners, family, run):
    with pytest.raises(StageError) as caught:
        run(base, chat_template=name).upto("02_data")
    assert caught.value.what == f"chat_template: {name} is the template of {owners}; base_model is {family}"
    assert caught.value.fix == "remove chat_template (the checkpoint's own serves), or name a .jinja file"


@pytest.mark.parametrize("name", ["tokenizer_default", "tokenizer_default_fallback_chatml"])
def test_the_tokenizers_default_is_the_checkpoints_own_template(name, run, zoo):
    first = run(chat_template=name).upto("02_data")
    assert saved_template(first) == (zoo("qwen_text") / "chat_template.jinja").read_text(encoding="utf-8")


def test_every_familys_template_name_is_one_that_01_takes():
    assert {name: paths.chat_template(name) for name in registry.template_names()} == {
        name: name for name in registry.template_names()}

"""Evaluation while training: losses by data set, and answers that are the saved model's own."""
import json
import re
import signal

import pytest
from datasets import load_from_disk

from lib.evaluation.evaluate import generate
from lib.evaluation.scores import METRICS, json_f1
from lib.models import model
from lib.models.saved import attach
from lib.text.chat import Encoder
from lib.training.metrics import Log
from tests.runner import Run, colour_rows, fork, lines, ranks, text_rows
from tests.test_resume import stop_at
from tests.test_train import CPU

HELD_OUT = {"val_set_size": 0, "test_datasets": [{"path": "texts.jsonl"}, {"path": "colours.jsonl"}]}
KNOBS = {"num_epochs": 2, "save_steps": 1, "learning_rate": 5e-2, "eval_answer_rows": 3, "eval_metrics": [*METRICS],
         "metric_for_best_model": "eval_anls", "load_best_model_at_end": False}


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run with two held-out data sets, in a folder of its own, with 04_lora finished."""
    def make(name="llava", **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for stem, rows in (("colours", colour_rows(3)), ("texts", text_rows(2))):
            (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Run(folder, monkeypatch, zoo(name), **KNOBS | HELD_OUT | knobs).upto("04_lora")
    return make


def evaluations(run):
    return [line for line in run.metrics() if "eval_loss" in line]


def left_by(run):
    names = ("metrics.jsonl", "answers.jsonl", "adapter/adapter_model.safetensors")
    return [(run.path / "05_train" / name).read_bytes() for name in names]


@pytest.mark.parametrize("name, knobs", [
    ("llava", {}), ("qwen2_5_vl", {"sample_packing": True, "cache_vision_features": True, "sequence_len": 400})])
def test_an_evaluation_answers_as_the_saved_weights_do_and_loses_by_data_set(name, knobs, make, capsys):
    run = make(name, **knobs)
    run("05_train")
    answers = lines(run.path / "05_train/answers.jsonl")
    assert [row["sample_id"] for row in answers] == 3 * ["texts-0", "texts-1", "colours-1"]
    assert [row["step"] for row in answers] == [line["step"] for line in evaluations(run) for _ in range(3)]
    net, encoder = model.load(run.json("03_load_model/model.json"), CPU), Encoder.load(run.path / "02_data/processor")
    net = attach(net, run.path / "05_train/adapter", trainable=False).eval()
    records = load_from_disk(run.path / "02_data/eval")
    for row, place in zip(answers[-3:], (0, 1, 3)):
        text, shown, reference = encoder.prompt(records[place])
        assert row["answer"] == generate(net, encoder, text, shown, 64) and row["reference"] == reference
    assert {row["answer"] for row in answers[:3]} != {row["answer"] for row in answers[-3:]}
    last = evaluations(run)[-1]
    for name, metric in METRICS.items():
        assert last[f"eval_{name}"] == metric(*([row[side] for row in answers[-3:]] for side in ("answer", "reference")))
    tokens = records["supervised_tokens"]
    mean = last["eval_texts_loss"] * sum(tokens[:2]) + last["eval_colours_loss"] * sum(tokens[2:])
    assert mean / sum(tokens) == pytest.approx(last["eval_loss"], rel=1e-6)
    assert last["eval_colours_loss"] != last["eval_texts_loss"]
    assert re.search(r"step 0: eval_loss .* \(.* s for losses, .* s for answers\)", capsys.readouterr().out)


def test_answers_change_nothing_in_training_and_survive_a_kill(make):
    run, killed, without = make(), make(), make(eval_answer_rows=0, metric_for_best_model="eval_loss")
    run("05_train"), without("05_train")
    killed.chdir(killed.folder)
    child = fork("05_train", "run", before=stop_at(Log, "step", 3)).wait()
    assert child.code == -signal.SIGKILL, child.said
    killed("05_train")
    assert left_by(run) == left_by(killed)
    assert run.losses() == without.losses() and not (without.path / "05_train/answers.jsonl").exists()


@pytest.mark.parametrize("knobs", [{}, {"fsdp_version": 2}])
def test_two_ranks_answer_as_one_does(knobs, make):
    one, two = make(), make(micro_batch_size=1, **knobs)
    one("05_train")
    two.chdir(two.folder)
    children = ranks(2, "05_train", "run")
    assert [child.code for child in children] == [0, 0], children[0].said + children[1].said
    assert [line.keys() for line in two.metrics()] == [line.keys() for line in one.metrics()]
    for ours, theirs in zip(evaluations(one), evaluations(two)):
        assert theirs == pytest.approx(ours, rel=2e-5)
    assert lines(one.path / "05_train/answers.jsonl") == lines(two.path / "05_train/answers.jsonl")


def test_json_f1_counts_the_fields_that_agree():
    reference = '{"total": "9.50", "items": [{"name": "tea"}, {"name": "cake"}]}'
    assert json_f1([reference], [reference]) == 1.0
    fenced = 'Here: ```json\n{"items": [{"name": "cake"}, {"name": "tea"}], "total": 9.5}\n```'
    assert json_f1([fenced], [reference]) == pytest.approx(2 * 2 / 6)   # 9.5 is not "9.50"
    assert json_f1(['{"total": "9.50"}', "none"], [reference, '{"a": 1}']) == pytest.approx(2 * 1 / (1 + 3 + 1))
    assert json_f1(["[" * 9000 + "]"], ["none"]) == 0.0

"""A recipe may name functions of one's own. MINE is what such a file looks like; the tests say what holds."""
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from safetensors import safe_open

from lib.batches.order import Order
from lib.collator import IGNORE_INDEX
from lib.evaluation.scores import metrics_of
from lib.models import model
from lib.run import stage
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.training import hooks, optim
from lib.training.metrics import Log
from tests import harness
from tests.harness import Bad, bad_input
from tests.runner import Run, fork
from tests.test_resume import stop_at
from tests.test_train import CPU, knobs

MINE = '''"""Functions of one's own, as small as they can be."""
import torch


class Slowing(torch.optim.SGD):
    """SGD with momentum whose steps become shorter; it counts them in its groups."""

    def step(self):
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            group["lr"] /= group["taken"]
        super().step()


def make_optimizer(groups, knobs):
    return Slowing(groups, lr=knobs.learning_rate, momentum=0.9)


def rate(step, steps):
    return 1 - step / steps               # counted from the end of the warm-up


def focal(logits, targets):
    """What is known already counts less (arXiv 1708.02002)."""
    known = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return -(1 - known.exp()) ** 2 * known


def letters(answers, references):
    return sum(map(len, answers)) / len(answers)
'''
ALL = {"optimizer": "mine.py:make_optimizer", "lr_scheduler": "mine.py:rate", "loss": "mine.py:focal",
       "eval_metrics": ["exact_match", "mine.py:letters"]}


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: knobs -> a run in a folder with mine.py, with 04_lora finished."""
    def make(**given):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        harness.write(folder, {"mine.py": MINE})
        return Run(folder, monkeypatch, zoo("llava"), num_epochs=2, save_steps=1, **given).upto("04_lora")
    return make


def test_a_run_trains_by_functions_of_ones_own_and_resumes_to_the_byte(make):
    run, killed = (make(**ALL, warmup_steps=1, eval_answer_rows=2) for _ in range(2))
    run("05_train")
    rates = [line["learning_rate"] for line in run.metrics() if "loss" in line]
    assert rates == pytest.approx([1e-3 / 2, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert run.losses()[0] == pytest.approx(focal_loss_of_the_first_step(run), rel=1e-5)
    assert all(line["eval_letters"] >= 0 for line in run.metrics() if "eval_loss" in line)
    with safe_open(run.path / "05_train/checkpoints/step-4/optimizer.safetensors", "pt") as file:
        assert {name.rpartition("|")[2] for name in file.keys()} == {"momentum_buffer"}
    killed.chdir(killed.folder)
    child = fork("05_train", "run", before=stop_at(Log, "step", 3)).wait()
    assert child.code == -signal.SIGKILL, child.said
    killed("05_train")
    for name in ("metrics.jsonl", "answers.jsonl", "adapter/adapter_model.safetensors"):
        assert (run.path / "05_train" / name).read_bytes() == (killed.path / "05_train" / name).read_bytes()


def focal_loss_of_the_first_step(run):
    """The mean over the step's trained tokens, from full logits."""
    net, encoder = model.load(run.json("03_load_model/model.json"), CPU), Encoder.load(run.path / "02_data/processor")
    records, losses = load_from_disk(run.path / "02_data/train"), []
    for index, in Order(records["input_tokens"], 4, seed=42).of_step(0):
        row = encoder(records[index])
        labels = row.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = net(**row, use_cache=False).logits[0, :-1].float()
        plain = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")[labels != IGNORE_INDEX]
        losses.append((1 - (-plain).exp()) ** 2 * plain)
    return float(torch.cat(losses).mean())


def test_a_changed_function_makes_training_out_of_date_and_a_comment_does_not(make):
    run = make(lr_scheduler="mine.py:rate")
    run("05_train")
    mine = run.folder / "mine.py"
    mine.write_text(MINE + "\n# a word\n", encoding="utf-8")
    assert stage.decide("05_train", run.path).action == "skip"
    mine.write_text(MINE.replace("1 - step", "2 - step"), encoding="utf-8")
    decision = stage.decide("05_train", run.path)
    assert decision.action == "refuse" and decision.what.endswith(f"{mine} was edited")
    assert any("mine.py" in warning for warning in stage.decide("06_save", run.path).warnings)


RECIPE = "base_model: ./base\ndatasets: [{path: rows.jsonl}]\nval_set_size: 1\n"
FILES = {"base/config.json": "{}", "rows.jsonl": "{}\n", "mine.py": MINE}
CASES = (
    Bad("a file that isn't there", ["r.yaml", "run"], "r.yaml:4: optimizer: min.py:make_optimizer is in no file here",
        "did you mean mine.py?", files=FILES | {"r.yaml": RECIPE + "optimizer: min.py:make_optimizer\n"}),
    Bad("a function that isn't there", ["r.yaml", "run"],
        "r.yaml:4: loss: mine.py:vocal names vocal, which isn't in that file", "did you mean mine.py:focal?",
        files=FILES | {"r.yaml": RECIPE + "loss: mine.py:vocal\n"}),
    Bad("neither a choice nor a function", ["r.yaml", "run"],
        "r.yaml:4: lr_scheduler: rates must be cosine, linear or constant or path/to/file.py:function",
        "for example lr_scheduler: cosine (the learning rate after the warm-up)",
        files=FILES | {"r.yaml": RECIPE + "lr_scheduler: rates\n"}),
    Bad("two metrics of one name", ["r.yaml", "run"],
        "r.yaml:4: eval_metrics: [anls, mine.py:anls] has two metrics named anls", "rename the function",
        files=FILES | {"r.yaml": RECIPE + "eval_metrics: [anls, mine.py:anls]\n"}),
)


@bad_input(CASES)
def test_a_recipe_that_names_no_function_ends_in_two_lines(case, tmp_path):
    harness.check(case, "01_config", tmp_path)


@pytest.mark.parametrize("code, call, words", [
    ("def f(groups, knobs):\n    return groups\n",
     lambda f: optim.make_optimizer({"a": torch.nn.Parameter(torch.ones(2))}, {"a": "language"}, knobs(optimizer=f)),
     "optimizer: mine.py:f returned [{'params'"),
    ("import torch\ndef f(groups, knobs):\n    return torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1)\n",
     lambda f: optim.make_optimizer({"a": torch.nn.Parameter(torch.ones(2))}, {"a": "language"}, knobs(optimizer=f)),
     "optimizer: mine.py:f has 2 tensors too few or too many, of 1 that train"),
    ("def f(step, steps):\n    return step - 1\n",
     lambda f: optim.learning_rate(knobs(lr_scheduler=f), 0, 4), "lr_scheduler: mine.py:f returned -1, not a number"),
    ("def f(step, steps):\n\n    return 1 / step\n",
     lambda f: optim.learning_rate(knobs(lr_scheduler=f), 0, 4), ":3: ZeroDivisionError: division by zero"),
    ("import nothing_of_this_name\nf = 1\n",
     lambda f: optim.learning_rate(knobs(lr_scheduler=f), 0, 4), ":1: ModuleNotFoundError: "),
    ("f = 1\n", lambda f: optim.learning_rate(knobs(lr_scheduler=f), 0, 4), "has no function f"),
    ("g = 1\n", lambda f: hooks.refuse_missing(SimpleNamespace(optimizer="adamw_torch", lr_scheduler="cosine", loss=f,
                                                     eval_metrics=["anls"])), "loss: mine.py has no function f"),
    ("def f(answers, references):\n    return None\n",
     lambda f: metrics_of([f])["f"](["a"], ["b"]), "eval_metrics: mine.py:f returned None, not a number"),
])
def test_a_function_that_raises_or_returns_something_else_ends_in_two_lines(code, call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        call("mine.py:f")
    assert words in caught.value.what and caught.value.fix


def test_losses_of_another_shape_end_in_two_lines_that_name_the_shape(make):
    run = make(loss="mine.py:focal")
    (run.folder / "mine.py").write_text(MINE.replace("** 2 * known", "** 2 * known).mean()").replace("-(1 -", "(-(1 -"))
    with pytest.raises(StageError, match=r"loss: mine.py:focal returned a tensor of shape \[\], not the losses of \d+"):
        run("05_train")

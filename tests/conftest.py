"""What several test files need: quiet threads, no network, built checkpoints, a small set of pictures."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads on two busy cores are slower than one
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach out fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import functools
import importlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lib.run import ledger, stage
from lib.run.folder import being_written, unlock
from tests.minikit import build_kit, start

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A function: a variant's name -> the folder of its checkpoint, built once for all tests."""
    from tests.zoo import build

    root = tmp_path_factory.mktemp("zoo")
    return functools.cache(lambda name, dtype="float32": build(
        name, root / (name if dtype == "float32" else f"{name}-{dtype}"), dtype=dtype))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, zoo):
    """A function: a variant's name and rows -> a run of them with 04_lora finished, made once for all tests."""
    from tests.runner import Run

    made = {}

    def prepared(name, rows, dtype="float32"):
        key = name, json.dumps(rows), dtype
        if key not in made:
            base = zoo(name, dtype)
            with pytest.MonkeyPatch.context() as patch:
                made[key] = Run(tmp_path_factory.mktemp("prepared"), patch, base, rows).upto("04_lora")
        return made[key]
    return prepared


@pytest.fixture
def make_run(prepared, tmp_path, monkeypatch):
    """A function: a variant's name, rows and knobs -> a run in a folder of its own, with 04_lora finished."""
    def make_run(name, rows=None, dtype="float32", **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return prepared(name, rows, dtype).twin(folder, monkeypatch, **knobs)
    return make_run


@pytest.fixture(scope="session")
def script():
    """A function: a numbered script's stem -> its module; `script("02_data").main(argv)` runs the stage."""
    return importlib.import_module


@pytest.fixture(autouse=True)
def unlocked():
    """A stage that stopped within the test has left no lock, as if its process had ended."""
    yield
    for path in being_written():
        unlock(path)


@pytest.fixture(scope="session")
def browser():
    """A real headless browser (tests/browser.py), started once."""
    from tests.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    started = Browser()
    yield started
    started.close()


def write_colours(folder: Path, rows: int = len(COLOURS)) -> Path:
    """The path of a data.jsonl, written with its pictures: each row asks for the colour of one of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, colour in zip(range(rows), COLOURS):
        Image.new("RGB", (40 + 8 * number, 32), colour).save(folder / f"{colour}.png")
        question = {"role": "user", "content": "Which colour is it?"}
        answer = {"role": "assistant", "content": colour}
        lines.append({"messages": [question, answer], "images": [f"{colour}.png"]})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return data


@pytest.fixture(scope="session")
def whole_kit(tmp_path_factory) -> Path:
    """A miniature kit whose six stages have run, each started by the command that the stage before it named."""
    root, command = tmp_path_factory.mktemp("whole") / "kit", "python 01_config.py recipe.json runs/demo"
    build_kit(root)
    with contextlib.chdir(root):
        for stem in stage.STAGES:
            assert command.startswith(f"python {stem}.py")
            done = start(command)
            assert done.returncode == 0, done.stderr
            assert f"{stem} finished in" in done.stdout
            command = done.stdout.rpartition("next: ")[2].strip()
    return root


@pytest.fixture
def kit(whole_kit, tmp_path, monkeypatch) -> Path:
    """A copy of the whole kit, which is the current folder and the kit of this process."""
    root = tmp_path / "kit"
    shutil.copytree(whole_kit, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(ledger, "ROOT", root)
    return root

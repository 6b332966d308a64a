"""Runs for tests: a recipe on a tiny checkpoint, stages called in this process, ranks that can be killed."""

import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

# The engine starts a thread for each kind of device when it first runs, and a process with such threads can't
# fork and train. Fake tensors (lib/memory/hollow.py) register CUDA, there or not; so it runs before there are any.
torch.ones(1, requires_grad=True).sum().backward()

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown")
KNOBS = {"adapter": "lora", "lora_r": 4, "bf16": False, "learning_rate": 1e-3, "num_epochs": 1,
         "micro_batch_size": 2, "gradient_accumulation_steps": 2, "val_set_size": 2,
         "golden_rows": 2, "answer_rows": 2, "max_new_tokens": 4}
STEMS = ("01_config", "02_data", "03_load_model", "04_lora", "05_train", "06_save")


class Run:
    """A folder with a recipe in it, which is the current folder, and a run folder named `run`."""

    def __init__(self, folder: Path, monkeypatch, base: Path, rows: list[dict] | None = None, **knobs):
        monkeypatch.chdir(folder)
        self.folder, self.path, self.chdir = folder, folder / "run", monkeypatch.chdir
        self.given = base, rows, knobs
        write_rows(folder, colour_rows() if rows is None else rows)
        given = KNOBS | {"base_model": str(base)} | knobs
        recipe = [f"{knob}: {json.dumps(value)}" for knob, value in given.items()]
        text = "\n".join([*recipe, "datasets: [{path: rows.jsonl}]"])
        (folder / "recipe.yaml").write_text(text + "\n", encoding="utf-8")

    def __call__(self, stem: str, *words: str):
        """Run main of a numbered script on the run folder, 01's on the recipe, too."""
        self.chdir(self.folder)
        given = ["recipe.yaml", "run", *words] if stem == "01_config" else ["run", *words]
        importlib.import_module(stem).main(given)

    def upto(self, stem: str, *overrides: str) -> "Run":
        """The run, with every stage up to this one finished."""
        for each in STEMS[:STEMS.index(stem) + 1]:
            self(each, *(overrides if each == "01_config" else ()))
        return self

    def twin(self, folder: Path, monkeypatch, **knobs) -> "Run":
        """A run of the same rows in a folder of its own, up to 04_lora; what other knobs leave as it is, is copied."""
        folder.mkdir()
        base, rows, given = self.given
        twin = Run(folder, monkeypatch, base, rows, **given | knobs)
        for stem in STEMS[1:4]:
            shutil.copytree(self.path / stem, twin.path / stem)
        return twin.upto("04_lora")

    def json(self, name: str) -> dict:
        """A JSON file of the run folder."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return lines(self.path / "05_train" / "metrics.jsonl")

    def losses(self) -> list[float]:
        """The training losses of all steps."""
        return [line["loss"] for line in self.metrics() if "loss" in line]

    def copy(self, name: str) -> Path:
        """The run folder, copied beside it under another name."""
        return Path(shutil.copytree(self.path, self.folder / name))


def colour_rows(number: int = 9) -> list[dict]:
    """Rows that ask for the colour of a picture."""
    return [row(f"Which colour is number {n}?", colour, f"{colour}.png") for n, colour in
            zip(range(number), COLOURS)]


def text_rows(number: int = 9) -> list[dict]:
    """Rows without pictures."""
    return [row(f"What follows {n}?", f"{n + 1}, and then {n + 2}") for n in range(number)]


def row(question: str, answer: str, *pictures: str) -> dict:
    """A row of a data file."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            "images": list(pictures)}


def write_rows(folder: Path, rows: list[dict]) -> None:
    """rows.jsonl, and beside it the pictures: COLOUR.png is a square of that colour."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    for name in {picture for each in rows for picture in each["images"]}:
        Image.new("RGB", (40, 32), Path(name).stem).save(folder / name)


def lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- processes ----

@dataclass
class Child:
    """A process forked from this one: starting Python and its libraries anew takes ten seconds."""
    pid: int
    output: object
    code: int | None = None

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, sign)

    def wait(self) -> "Child":
        """The child, ended: `code` is its exit code, or minus the signal that killed it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self

    @property
    def said(self) -> str:
        """What it has printed, on stdout and stderr."""
        self.output.seek(0)
        return self.output.read()


def fork(stem: str, *words: str, before=lambda: None, **environ: str) -> Child:
    """A process that runs `stem.py words` from the current folder, as `python stem.py words` would."""
    def script():
        os.environ.update(environ)
        become(stem, words, before)
    return child_of(script)


def become(stem: str, words: tuple[str, ...], before) -> None:
    """Run `stem.py words` in this process, or end it with the script's exit code."""
    from lib.run import stage, terminal
    terminal.QUIET = terminal.console.quiet = os.environ.get("RANK", "0") != "0"
    before()
    stage.run_script(lambda: importlib.import_module(stem).main(list(words)))


def child_of(work) -> Child:
    """A process forked from this one, which calls `work` and ends."""
    output = tempfile.TemporaryFile("w+", encoding="utf-8")
    pid = os.fork()
    if pid:
        return Child(pid, output)
    code = 0
    try:
        sys.stdout = sys.stderr = output
        work()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        output.flush()
        os._exit(code)


def torchrun(nodes: int, stem: str, *words: str, before=lambda: None) -> list[Child]:
    """torchrun of so many nodes, all on this machine, one rank each; they run, and print what their ranks do.

    Its agents, their meeting and their signals are torchrun's own; only the ranks are forked, as in `fork`.
    """
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    def rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)              # not the agent's
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(stem, words, before)

    together = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", free_port()]
    return [child_of(lambda: elastic_launch(config_from_args(parse_args(
        [*together, "--node-rank", str(node), "--start-method", "fork", f"{stem}.py"]))[0], rank)())
        for node in range(nodes)]


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(number: int, stem: str, *words: str, before=lambda: None) -> list[Child]:
    """So many ranks of one training, all ended, in torchrun's environment; one that fails ends all."""
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = [fork(stem, *words, before=before, RANK=str(rank), LOCAL_RANK=str(rank), **world)
                for rank in range(number)]
    running = list(children)
    while running:
        pid, status = os.wait()
        ended = next(child for child in children if child.pid == pid)
        ended.code = os.waitstatus_to_exitcode(status)
        running.remove(ended)
        if ended.code:                                             # as torchrun does
            for other in running:
                other.kill(signal.SIGTERM)
    return children


def assert_trained(children: list[Child]) -> None:
    """Assert that all of the processes have ended well."""
    assert all(child.code == 0 for child in children), "".join(child.said for child in children)

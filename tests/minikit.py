"""A miniature kit for tests of the run folder: six tiny scripts on a copy of lib/run/stage.py and its parts."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import lib
from lib.run import ledger

KIT = Path(__file__).resolve().parent.parent
PARTS = ("__init__", "code", "decision", "errors", "folder", "ledger", "program", "stage", "terminal", "versions")

CONFIG = '''
"""01_config: resolves the recipe."""
import json
from lib.run import stage

def main():
    parser = stage.arguments(__doc__)
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()
    recipe, given = stage.Path(args.run), args.more
    run, overrides = stage.Path(given[0]), given[1:]
    knobs = {"recipe": str(recipe), "overrides": overrides}
    work = stage.begin(stage.decide("01_config", run, force=args.force, knobs=knobs))
    if work is None:
        return
    work.uses(recipe)
    config = json.loads(recipe.read_text()) | dict(pair.split("=") for pair in overrides)
    (work.path / "config.json").write_text(json.dumps(config))
    (work.path / "stages.json").write_text(json.dumps({
        "02_data": ["rows", "workers"], "03_load_model": [], "04_lora": ["lora_r"],
        "05_train": ["steps", "logging_steps"], "06_save": [], "not_identity": ["workers", "logging_steps"]}))
    stage.remember_latest(run)
    work.finish()

if __name__ == "__main__":
    stage.run_script(main)
'''

DATA = '''
"""02_data: turns rows into samples."""
import os
import time
from lib.run import stage

def main():
    parser = stage.arguments(__doc__)
    parser.add_argument("--show", type=int)
    args = parser.parse_args()
    run = stage.resolve_run(args.run)
    if args.show:
        work = stage.view("02_data", run, own=True)
        for line in [(work.path / "rows.txt").read_text()] * args.show:
            print(line, flush=True)
        return
    from lib import words
    work = stage.begin(stage.decide("02_data", run, force=args.force))
    if work is None:
        return
    work.uses("rows.txt")
    work.uses("images")
    if os.environ.get("FULL"):
        (work.path / "rows.txt").symlink_to("/dev/full")
    with (work.path / "rows.txt").open("w") as file:
        file.write(words.louder(stage.Path("rows.txt").read_text()) * int(work.config.rows))
    if os.environ.get("WAIT"):
        print("waiting", flush=True)
        time.sleep(60)
    (work.path / "seconds.json").write_text(str(time.time()))
    work.finish(volatile=("seconds.json",))

if __name__ == "__main__":
    stage.run_script(main)
'''

SIMPLE = '''
"""{stem}: reads {source} and writes one file."""
from lib.run import stage

def main():
    args = stage.arguments(__doc__).parse_args()
    work = stage.begin(stage.decide("{stem}", stage.resolve_run(args.run), force=args.force))
    if work is None:
        return
    text = (work.input("{source}") / "{read}").read_text()
    (work.path / "out.txt").write_text(f"{{text}}{stem} {{vars(work.config)}}")
    work.finish()

if __name__ == "__main__":
    stage.run_script(main)
'''

TRAIN = '''
"""05_train: counts its steps."""
import os
import time
from lib.run import folder, stage

def main():
    parser = stage.arguments(__doc__)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    run = stage.resolve_run(args.run)
    work = stage.begin(stage.decide("05_train", run, force=args.force, resume=args.resume))
    if work is None:
        return
    first = int(work.checkpoint.name[5:]) if work.checkpoint else 0
    stop_at = int(os.environ.get("STOP_AT", "-1"))
    for step in range(first + 1, int(work.config.steps) + 1):
        aside = work.path / "checkpoints" / f".step-{step}.partial"
        aside.mkdir(parents=True, exist_ok=True)
        if step == stop_at:
            print("waiting", flush=True)
            time.sleep(60)
        (aside / "state.json").write_text("{}")
        folder.seal(aside)
        aside.rename(aside.with_name(f"step-{step}"))
    (work.path / "adapter.txt").write_text(f"{first} to {work.config.steps}")
    work.finish(volatile=("checkpoints",))

if __name__ == "__main__":
    stage.run_script(main)
'''

WORDS = "from . import tools\n\ndef louder(text):\n    return tools.upper(text)\n"
TOOLS = "def upper(text):\n    return text.upper()\n"
SCRIPTS = {
    "01_config": CONFIG,
    "02_data": DATA,
    "03_load_model": SIMPLE.format(stem="03_load_model", source="02_data", read="rows.txt"),
    "04_lora": SIMPLE.format(stem="04_lora", source="03_load_model", read="out.txt"),
    "05_train": TRAIN,
    "06_save": SIMPLE.format(stem="06_save", source="05_train", read="adapter.txt"),
}
RECIPE = {"rows": 2, "workers": 1, "lora_r": 16, "steps": 3, "logging_steps": 1}


@dataclass
class Done:
    """A script that has ended."""

    returncode: int
    stdout: str
    stderr: str


def start(command: str, **environ: str) -> Done:
    """The end of a command like "02_data.py runs/demo", run by a child process in the current folder.

    The child is forked from this process, because starting Python anew takes ten times longer.
    """
    words = command.removeprefix("python ").split()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _become(words, out, err, environ)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return Done(code, out.read(), err.read())


def _become(words: list[str], out, err, environ: dict) -> None:
    """Never returns; this process is the script, as `python script ...` would be."""
    code = 0
    try:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), words
        os.environ.update(environ)
        ledger.ROOT = Path.cwd()
        lib.__path__.append(str(Path("lib").absolute()))  # where the kit has a words.py of its own
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def started(command: str, **environ: str) -> subprocess.Popen:
    """A running process that has printed "waiting"."""
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    while process.stdout.readline() not in ("waiting\n", ""):
        pass
    return process


def build_kit(root: Path) -> None:
    """A kit whose stages have not run."""
    (root / "lib/run").mkdir(parents=True)
    for part in PARTS:
        shutil.copy2(KIT / "lib/run" / f"{part}.py", root / "lib/run")
    shutil.copy2(KIT / "lib/__init__.py", root / "lib")
    (root / "lib/words.py").write_text(WORDS)
    (root / "lib/tools.py").write_text(TOOLS)
    for stem, script in SCRIPTS.items():
        (root / f"{stem}.py").write_text(script.lstrip())
    (root / "recipe.json").write_text(json.dumps(RECIPE))
    (root / "rows.txt").write_text("a row\n")
    (root / "images").mkdir()
    (root / "images/one.png").write_text("one")

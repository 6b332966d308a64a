"""apart: a module of the bench in a process of its own, and the file that a result goes to."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from bench import machine
from lib.run import stage
from lib.run.errors import StageError

FOLDER = stage.ROOT / "runs" / "bench"
RESULTS = stage.ROOT / "bench" / "results"


def process(inside: Path, module: str, *words) -> str:
    """What a module printed, run in a process of its own; a StageError where that fails.

    inside: where it runs, since the paths of a run's recipe start there.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(stage.ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, cwd=inside, text=True, capture_output=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise StageError(f"{module} failed: {said}", f"in {inside}: {shlex.join(command)}")
    return done.stdout


def last_line(text: str) -> dict:
    """What a module printed last, as JSON."""
    return json.loads(text.splitlines()[-1])


def write_result(name: str, content: dict) -> None:
    """Write bench/results/NAME-MACHINE.json, with machine and commit."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{machine.slug(machine.name())}.json"
    path.write_text(json.dumps(machine.described() | content, indent=1) + "\n", encoding="utf-8")

"""kill: a training that is killed with SIGKILL over and over, at random moments, on one process and on two.

    python -m bench.kill --times 200            # prints how many kills fell where, and what differed afterwards

Half of the kills come after a random time, anywhere from a start's first line to its last. The other half come
just before a random operation on the run folder (opening, syncing, renaming or removing a file, making or
removing a folder), since these take too little time for a clock to hit them. A killed training is started
again, and may be killed again; what it ends with is compared to the bytes of one that nothing happened to.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.runner import Child, Run, assert_trained, fork, ranks

# 7 samples, 4 a step: 2 steps an epoch; checkpoints, evaluations and removals at every one, dropout to repeat.
KNOBS = {"num_epochs": 3, "save_steps": 1, "evals_per_epoch": 2, "save_total_limit": 2, "lora_dropout": 0.2,
         "load_best_model_at_end": True}
CUT = {1: {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
       2: {"micro_batch_size": 1, "gradient_accumulation_steps": 2}}
COMPARED = ("metrics.jsonl", "trained.json", "golden.safetensors", "adapter/adapter_model.safetensors")
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")  # audited by Python; os.fsync is not


@dataclass
class Kills:
    """What became of the kills: how many of each kind, where they found the training, and what differed."""
    by_kind: Counter = field(default_factory=Counter)
    left_behind: Counter = field(default_factory=Counter)
    ends: int = 0
    differing: list[str] = field(default_factory=list)


def train(run: Run, number: int, before: Callable = lambda: None) -> list[Child]:
    """The ranks of one start of 05_train, all ended."""
    run.chdir(run.folder)
    return [fork("05_train", "run", before=before).wait()] if number == 1 else \
        ranks(number, "05_train", "run", before=before)


def kill_after(seconds: float, victims: set[int]) -> Callable:
    """A function for a forked rank: so many seconds later it is killed from outside, if it is a victim."""
    def prepare():
        rank, pid = int(os.environ.get("RANK", "0")), os.getpid()
        if rank in victims and os.fork() == 0:
            time.sleep(seconds)
            if os.getppid() == pid:                                # it may have ended before
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
    return prepare


def count_operations(act: Callable[[int], None]) -> Callable:
    """A function for a forked process: there, `act(n)` is called before the n-th operation on its 05_train."""
    def prepare():
        count = 0

        def operation(*_):
            nonlocal count
            count += 1
            act(count)

        def audited(event, given):
            if event in OPERATIONS and "05_train" in str(given[0]):
                operation()

        sync = os.fsync
        os.fsync = lambda handle: (operation(), sync(handle))
        sys.addaudithook(audited)
    return prepare


def kill_before(number: int) -> Callable:
    """A function for a forked process: it is killed before its n-th operation on its 05_train."""
    return count_operations(lambda count: count == number and os.kill(os.getpid(), signal.SIGKILL))


def count_into(path: Path) -> Callable:
    """A function for a forked process: the file is as many bytes long as there were operations."""
    def prepare():
        handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        count_operations(lambda _: os.write(handle, b"."))()
    return prepare


def endure(run: Run, number: int, times: int, chance: random.Random) -> Kills:
    """What became of so many kills of a run whose 04_lora has finished, trained by `number` ranks."""
    kills, prepared, counted = Kills(), run.copy("prepared"), run.folder / "operations"
    assert_trained(train(run, number))                             # imports and first calls cost most
    reset(run, prepared)
    began = time.monotonic()
    assert_trained(train(run, number, before=count_into(counted)))
    seconds, operations = time.monotonic() - began, counted.stat().st_size
    expected = contents(run)
    reset(run, prepared)
    while sum(kills.by_kind.values()) < times:
        kind = ("after a time", "before an operation")[sum(kills.by_kind.values()) % 2]
        victims = set(chance.sample(range(number), chance.randint(1, number)))
        before = kill_after(chance.uniform(0, seconds), victims) if kind == "after a time" else \
            kill_before(chance.randint(1, operations))
        children = train(run, number, before)
        if any(child.code == -signal.SIGKILL for child in children):
            kills.by_kind[kind] += 1
            kills.left_behind[left_behind(run)] += 1
        elif any(child.code for child in children):
            raise SystemExit("".join(child.said for child in children))
        if (run.path / "05_train").exists():
            compare(run, expected, kills)
            reset(run, prepared)
    train(run, number)
    compare(run, expected, kills)
    return kills


def reset(run: Run, prepared: Path) -> None:
    """The run is as it was before its training."""
    shutil.rmtree(run.path)
    shutil.copytree(prepared, run.path)


def contents(run: Run) -> dict[str, bytes]:
    """What a finished training leaves that has to be the same."""
    return {name: (run.path / "05_train" / name).read_bytes() for name in COMPARED}


def compare(run: Run, expected: dict[str, bytes], kills: Kills) -> None:
    """Count the end of a training, and note which of its files differ."""
    found = contents(run)
    kills.ends += 1
    kills.differing += [name for name in COMPARED if found[name] != expected[name]]


def left_behind(run: Run) -> str:
    """What a kill left, in words."""
    partial = run.path / "05_train.partial"
    steps = sorted(int(path.name[5:]) for path in partial.glob("checkpoints/step-*"))
    if (run.path / "05_train").exists():
        return "finished"
    half = ", one half written" if list(partial.glob("checkpoints/.step-*")) else ""
    return (f"step-{steps[-1]}" if steps else "no checkpoint") + half


def main() -> None:
    """Kill, and say what became of it."""
    import pytest

    from tests.zoo import build
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="kills on each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        base = build("llava", Path(name) / "base")
        for number in args.ranks:
            folder = Path(name) / f"{number}"
            folder.mkdir()
            run = Run(folder, patch, base, **KNOBS | CUT[number]).upto("04_lora")
            kills = endure(run, number, args.times, random.Random(args.seed))
            print(f"{number} ranks: kills {dict(kills.by_kind)}; found {dict(sorted(kills.left_behind.items()))}; "
                  f"{kills.ends} ends, files that differ: {kills.differing or 'none'}", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()

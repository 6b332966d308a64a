"""checkpoint: what resuming needs, written aside and then renamed: a folder named step-N is always whole.

A checkpoint holds the trained weights, the optimizer's moments, a small state.json, and SHA256SUMS over the
three. No random state: the loop derives its randomness from (seed, step, rank). No processor: 02_data has it.
"""
import json
import os
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib.run import folder, ledger
from lib.run.errors import StageError

STATE = ("step", "global_batch_size", "per_rank", "scaler", "groups")   # per_rank: the recipe's


class Writer:
    """Saves in a thread, so that training waits for the copy to host memory, but not for the disk.

    One checkpoint is written at a time: the next one waits, and so does leaving the `with`. What failed in
    the thread is raised by the next call.
    """

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep                          # of 05_train; the newest that are kept
        self._thread, self._writing = ThreadPoolExecutor(1), None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, step: int, parameters: dict[str, torch.nn.Parameter], optimizer, state: dict,
             also_keep: Collection[int] = ()) -> None:
        """Copy a checkpoint to host memory and begin to write it; once it is whole, old ones are removed."""
        self.wait()
        weights = {name: host_copy(p) for name, p in parameters.items()}
        tensors = weights, moments(parameters, optimizer)
        self._writing = self._thread.submit(self._write, step, *tensors, state, also_keep)

    def look(self) -> None:
        """Raise what the last save failed with, if it has ended; don't wait for it."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last save to end; raise what it failed with."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, step: int, weights: dict, moments: dict, state: dict, also_keep) -> None:
        ledger.sync(self.path / "metrics.jsonl")                   # a checkpoint must not outlive its lines
        write(self.path / "checkpoints", step, weights, moments, state)
        prune(self.path, step, self.keep, also_keep)


def write(checkpoints: Path, step: int, weights: dict, moments: dict, state: dict) -> Path:
    """The finished checkpoints/step-N: weights.safetensors, optimizer.safetensors, state.json, SHA256SUMS."""
    final, aside = checkpoints / f"step-{step}", checkpoints / f".step-{step}.partial"
    for left in checkpoints.glob(".step-*.partial"):               # a save that was killed
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    save_file(weights, aside / "weights.safetensors")
    save_file(moments, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    folder.seal(aside)
    ledger.sync(checkpoints.parent)
    if final.exists():                                             # one that was damaged, and passed over
        shutil.rmtree(final)
    os.replace(aside, final)
    ledger.sync(checkpoints)
    return final


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor in host memory, which training can't change while it is written."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def moments(parameters: dict[str, torch.nn.Parameter], optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors in host memory, named by parameter: `NAME|exp_avg` and so on."""
    return {f"{name}|{kind}": host_copy(as_tensor(kind, value))
            for name, p in parameters.items() for kind, value in optimizer.state.get(p, {}).items()
            if value is not None}


def as_tensor(kind: str, value) -> torch.Tensor:
    """A value of an optimizer's state as a tensor; a plain number keeps its full precision."""
    if not isinstance(value, (torch.Tensor, int, float)):
        raise StageError(f"optimizer: its {kind} of a parameter is a {type(value).__name__}, which no "
                         "checkpoint holds", "keep tensors and numbers in its state")
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def prune(path: Path, step: int, keep: int, also: Collection[int] = ()) -> None:
    """Remove checkpoints of a 05_train folder, except the newest `keep` up to step and those in `also`.

    Those of later steps go, too: they are damaged, so the start that wrote this step resumed before them.
    """
    found = [(int(each.name[5:]), each) for each in folder.checkpoints(path)]
    kept = {number for number, _ in [pair for pair in found if pair[0] <= step][:keep]} | set(also)
    for number, each in found:
        if number not in kept:
            shutil.rmtree(each)


def read_state(path: Path) -> dict:
    """The loop's state in a checkpoint, the keys of STATE; StageError where an older version wrote fewer."""
    state = ledger.read_json(path / "state.json")
    if lacking := [name for name in STATE if name not in state]:
        raise StageError(f"{path} doesn't say its {' and '.join(lacking)}: an older version wrote it",
                         "finish the run with that version, or start over with --force")
    return state


def load(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer) -> None:
    """Copy a checkpoint's weights into the parameters and its moments into the optimizer."""
    load_weights(path, parameters)
    state = optimizer.state_dict()
    numbers = {p: number for number, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        plain = value.dtype in (torch.int64, torch.float64) and not value.dim()   # as bitsandbytes' steps are
        state["state"].setdefault(numbers[parameters[name]], {})[kind] = value.item() if plain else value
    optimizer.load_state_dict(state)  # which knows the device and dtype that each moment needs


def load_weights(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Copy a checkpoint's weights into the parameters; StageError where the tensors' names differ."""
    weights = load_file(path / "weights.safetensors")
    if odd := sorted(weights.keys() ^ parameters.keys()):
        raise StageError(f"{path}: {len(odd)} trained tensors differ from this run's, such as {odd[0]}",
                         "resume with the recipe that wrote it, or start again with --force")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])

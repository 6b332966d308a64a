"""checkpoint: what resuming needs, written aside and renamed, so that a folder named step-N is always whole.

A checkpoint holds the trained weights, the optimizer's moments and a small state.json. No random state: the
loop derives its randomness from (seed, step, rank).
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib.stage import StageError


def save(folder: Path, step: int, parameters: dict[str, torch.nn.Parameter], optimizer, state: dict) -> Path:
    """The finished folder/step-N, with weights.safetensors, optimizer.safetensors and state.json."""
    final, aside = folder / f"step-{step}", folder / f".step-{step}.partial"
    for left in folder.glob(".step-*.partial"):  # a save that was killed
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    save_file({name: on_cpu(p) for name, p in parameters.items()}, aside / "weights.safetensors")
    save_file(moments(parameters, optimizer), aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)  # a replayed step-N
    os.replace(aside, final)
    sync(folder)
    return final


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a file holds it."""
    return tensor.detach().cpu().contiguous()


def moments(parameters: dict[str, torch.nn.Parameter], optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors, named by parameter: `NAME|exp_avg` and so on."""
    return {f"{name}|{kind}": on_cpu(value)
            for name, p in parameters.items() for kind, value in optimizer.state.get(p, {}).items()}


def read_state(path: Path) -> dict:
    """What the loop knew when it wrote this checkpoint: step, global_batch_size, world_size."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer) -> None:
    """Put a checkpoint's weights and moments in place."""
    weights = load_file(path / "weights.safetensors")
    if odd := sorted(weights.keys() ^ parameters.keys()):
        raise StageError(f"{path}: {len(odd)} trained tensors differ from this run's, such as {odd[0]}",
                         "resume with the recipe that wrote it, or start again with --force")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    state = optimizer.state_dict()
    numbers = {p: number for number, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        state["state"].setdefault(numbers[parameters[name]], {})[kind] = value
    optimizer.load_state_dict(state)  # which knows the device and dtype that each moment needs


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    steps = [int(path.name[5:]) for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    for step in sorted(steps)[:-keep]:
        shutil.rmtree(folder / f"step-{step}")


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

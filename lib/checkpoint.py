"""checkpoint: everything that resuming needs, written aside and renamed, so that a folder named step-N is always whole.

A checkpoint holds trained weights, optimizer moments and a small state.json. No random state: the loop derives its randomness
from (seed, step, rank).
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
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, aside / "weights.safetensors")
    save_file(moments(parameters, optimizer), aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)  # a damaged or replayed step-N
    os.replace(aside, final)
    sync(folder)
    return final


def moments(parameters: dict[str, torch.nn.Parameter], optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors, named by parameter: `NAME|exp_avg` and so on."""
    return {f"{name}|{key}": value.detach().cpu().contiguous()
            for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items()}


def load(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer) -> dict:
    """The checkpoint's state.json, after its weights and moments were put in place."""
    weights = load_file(path / "weights.safetensors")
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise StageError(f"{path}: {len(odd)} trained tensors differ from this run's, such as {odd[0]}",
                         "resume with the recipe that wrote it, or start again with --force")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        p = parameters[name]
        # Adam's step counter stays where a fresh optimizer would create it; fused kernels want it on the device.
        optimizer.state[p][kind] = value.to(p.device)
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def whole(folder: Path) -> list[Path]:
    """All finished checkpoints of a folder."""
    return [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "state.json").exists()]


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in sorted(whole(folder), key=step_of)[:-keep or None]:
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

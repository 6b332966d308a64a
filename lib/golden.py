"""golden: what was trained and what it answers, kept for a fresh process to reproduce.

The logits are those of the plain inference forward (no autocast, no dropout), because that is what serves:
under autocast the same weights differ by about one percent.
"""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib.chat import IGNORE_INDEX

POSITIONS = 16                            # logits kept per row: 16 x 262k x 4 bytes = 16 MiB


@torch.no_grad()
def write_golden(model, weights: dict[str, torch.Tensor], samples, count: int, path: Path) -> None:
    """Write the inputs of the first `count` samples and the float32 logits [positions, V] where they train.

    Keys: `ROW.NAME` for each tensor that the model takes, `ROW.positions` and `ROW.logits`. In the header:
    the sample ids, and the sha256 of each of the `weights` by its name.
    """
    tensors = {}
    rows = range(min(count, len(samples)))
    for row in rows:
        encoded = samples.encoded(row)
        labels = encoded.pop("labels")
        positions = torch.nonzero(labels[0, 1:] != IGNORE_INDEX).flatten()[:POSITIONS]
        inputs = {key: value.to(model.device) for key, value in encoded.items()}
        logits = model(**inputs, use_cache=False).logits[0].cpu()[positions].float()
        tensors |= {f"{row}.{key}": value.contiguous() for key, value in encoded.items()}
        tensors |= {f"{row}.positions": positions, f"{row}.logits": logits.contiguous()}
    header = {"sample_ids": [samples.ids[row] for row in rows],
              "sha256": {name: fingerprint(tensor) for name, tensor in weights.items()}}
    save_file(tensors, path, metadata={"golden": json.dumps(header)})  # several keys would come in any order


def fingerprint(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def read_header(path: Path) -> dict:
    """{sample_ids: [...], sha256: {tensor name: hash}} of golden.safetensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["golden"])

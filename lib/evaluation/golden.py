"""golden: hashes of the trained weights and some of their logits, kept for a fresh process to reproduce.

The logits are those of the plain inference forward (no autocast, no dropout), because that is what serves:
under autocast the same weights differ by about one percent.
"""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib.collator import IGNORE_INDEX

POSITIONS = 16                            # logits kept per row: 16 x 262k x 4 bytes = 16 MiB


@torch.no_grad()
def golden_answers(model, samples, count: int) -> dict[str, torch.Tensor]:
    """The inputs of the first `count` samples and float32 logits [positions, V] at trained positions.

    Keys: `ROW.NAME` for each tensor that the model takes, `ROW.positions` and `ROW.logits`.
    """
    tensors = {}
    for row in range(min(count, len(samples))):
        encoded = samples.encoded(row)
        labels = encoded.pop("labels")
        positions = torch.nonzero(labels[0, 1:] != IGNORE_INDEX).flatten()[:POSITIONS]
        inputs = {key: value.to(model.device) for key, value in encoded.items()}
        logits = model(**inputs, use_cache=False).logits[0].cpu()[positions].float()
        tensors |= {f"{row}.{key}": value.contiguous() for key, value in encoded.items()}
        tensors |= {f"{row}.positions": positions, f"{row}.logits": logits.contiguous()}
    return tensors


def write_golden(answers: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], sample_ids: list[str],
                 path: Path) -> None:
    """Write `golden_answers`, with the sample ids and the sha256 of each weight by name in the header."""
    header = {"sample_ids": sample_ids,
              "sha256": {name: fingerprint(tensor) for name, tensor in weights.items()}}
    save_file(answers, path, metadata={"golden": json.dumps(header)})  # several keys would come in any order


def fingerprint(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def read_header(path: Path) -> dict:
    """{sample_ids: [...], sha256: {tensor name: hash}} of golden.safetensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["golden"])

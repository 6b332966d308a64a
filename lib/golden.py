"""golden: what the trained weights answer, kept as tensors for a fresh process to reproduce.

Computed in the plain inference forward (no autocast, no dropout, no kit), because that is what serves: under autocast the same
weights differ by about one percent.
"""
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

POSITIONS = 16                            # logits kept per row: 16 x 262k x 4 bytes = 16 MiB


@torch.no_grad()
def write_golden(model, samples, count: int, path: Path) -> None:
    """Write the encoded inputs of the first `count` samples and their float32 logits [positions, V] where trained.

    Keys: `ROW.NAME` for each tensor that the model takes, `ROW.positions` and `ROW.logits`.
    """
    tensors, ids = {}, []
    for row in range(min(count, len(samples))):
        encoded = samples[row]
        labels = encoded.pop("labels")
        positions = (torch.nonzero(labels[0, 1:] != -100).flatten())[:POSITIONS]
        inputs = {key: value.to(model.device) for key, value in encoded.items()}
        logits = model(**inputs, use_cache=False).logits[0].cpu()[positions].float()
        tensors |= {f"{row}.{key}": value.contiguous() for key, value in encoded.items()}
        tensors |= {f"{row}.positions": positions, f"{row}.logits": logits.contiguous()}
        ids.append(samples.records[row]["sample_id"])
    save_file(tensors, path, metadata={"sample_ids": "\n".join(ids)})


def read_sample_ids(path: Path) -> list[str]:
    """The ids of the golden rows, in their order."""
    with safe_open(str(path), "pt") as file:
        return file.metadata()["sample_ids"].split("\n")

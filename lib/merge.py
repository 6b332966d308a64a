"""merge: the adapter folded into its base, as a model that needs no peft.

Source: LoRA (arXiv 2106.09685), section 4.1: W + (alpha / r) B A has no extra cost at inference.
"""
from pathlib import Path

import torch

from lib import model


def write_merged(plan: dict, adapter_path: Path, folder: Path) -> None:
    """Write base plus adapter to `folder`, added up in float32 and cast once, under the base's own tensor names.

    A quantised base is merged into its original weights, not into the quantised ones.
    """
    base = model.load(plan | {"quantisation": None, "dtype": "float32"}, torch.device("cpu"), mode="inference")
    merged = model.attach(base, adapter_path, trainable=False).merge_and_unload()
    merged.to(getattr(torch, plan["dtype"]))
    merged.config.dtype = getattr(torch, plan["dtype"])
    with model.quiet():
        merged.save_pretrained(folder)

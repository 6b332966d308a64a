"""merge: the adapter folded into its base, as a model that needs no peft.

Source: LoRA (arXiv 2106.09685), section 4.1: W + (alpha / r) B A costs nothing at inference.
"""
from pathlib import Path

import torch

from lib import model


def write_merged(plan: dict, adapter_path: Path, folder: Path) -> None:
    """Write base plus adapter, added up in float32 and cast once, under the base's own tensor names.

    A quantised base is merged into its original weights, not into the quantised ones.
    """
    whole, dtype = plan | {"quantisation": None, "dtype": "float32"}, getattr(torch, plan["dtype"])
    base = model.load(whole, torch.device("cpu"))
    merged = model.attach(base, adapter_path, trainable=False).merge_and_unload()
    for parameter in merged.parameters():
        parameter.checkpoint_dtype = dtype
    merged.config.dtype = dtype
    model.save_full(merged, folder)

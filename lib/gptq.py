"""gptq: checkpoints whose linear layers are packed integers, read as plain weights, one tensor at a time.

GPTQ's own packages bring kernels for inference on CUDA. Training needs none of them: the frozen weights are
what the integers stand for, scale * (integer - zero), and an adapter that fits them fits the packed ones.

Source: GPTQ (arXiv 2210.17323); the layout is AutoGPTQ's and GPTQModel's.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib import shards
from lib.shards import whole
from lib.stage import StageError

ZERO = {"gptq": 1, "gptq_v2": 0}                     # what a zero point is stored less, by the layout's name
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 4, 8)                                     # which a word of 32 bits holds without a rest


def layout_of(settings: dict) -> str:
    """The name of a checkpoint's layout; one that names none is of the first kind."""
    return settings.get("checkpoint_format", "gptq")


def refuse_layouts(settings: dict) -> None:
    """A StageError for a layout that isn't read here."""
    layout = layout_of(settings)
    if settings["bits"] not in BITS or layout not in ZERO:
        what = f"base_model: GPTQ in {settings['bits']} bits, laid out as {layout}, isn't read here"
        raise StageError(what, "name the unquantised checkpoint; adapter: qlora makes 4 bits of it")


@dataclass(frozen=True)
class Later:
    """A tensor that is read when `[...]` is taken of it, as transformers' loading does."""
    read: Callable[[], torch.Tensor]

    def __getitem__(self, _) -> torch.Tensor:
        return self.read()


def in_place_of_files(plan: dict, config) -> dict:
    """transformers' arguments for a load from memory; its config says no more that weights are packed."""
    from transformers import GenerationConfig
    tensors = weights(plan, config.quantization_config)
    del config.quantization_config
    beside = shards.base_file(plan, "generation_config.json")
    said = {"generation_config": GenerationConfig.from_pretrained(beside.parent)} if beside else {}
    return {"config": config, "state_dict": tensors, **said}


def weights(plan: dict, settings: dict) -> dict[str, Later]:
    """{name: tensor to come} of a checkpoint; a packed layer is `LAYER.weight`. OSError where one lacks."""
    places, found = {}, {}
    for path in shards.weight_files(plan):
        if path is None:
            raise OSError("no .safetensors file is there")
        places |= shards.places(path)
    bits, zero = settings["bits"], ZERO[layout_of(settings)]
    for name, place in places.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            if lacking := [part for part in PARTS if f"{layer}.{part}" not in places]:
                raise OSError(f"there is no {layer}.{lacking[0]}")
            parts = [places[f"{layer}.{part}"] for part in PARTS]
            found[f"{layer}.weight"] = Later(lambda parts=parts: unpacked(*map(whole, parts), bits, zero))
        elif part not in PARTS or f"{layer}.qweight" not in places:
            found[name] = Later(lambda place=place: whole(place))
    return found


def unpacked(qweight, qzeros, scales, g_idx, bits: int, zero: int) -> torch.Tensor:
    """The weight [out, in] in bfloat16.

    qweight [in * bits / 32, out] and qzeros [groups, out * bits / 32] are words of 32 bits, the lowest bits
    first; scales [groups, out]; g_idx [in] says to which group an input belongs.
    """
    shifts, most = torch.arange(0, 32, bits, dtype=torch.int32), 2**bits - 1
    values = (qweight[:, None, :] >> shifts[None, :, None] & most).flatten(0, 1)           # [in, out]
    zeros = (qzeros[:, :, None] >> shifts & most).flatten(1)                               # [groups, out]
    zeros, group = (zeros + zero) & most, g_idx.long()
    return (scales.float()[group] * (values - zeros[group])).T.to(torch.bfloat16).contiguous()

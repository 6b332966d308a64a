"""gptq: checkpoints whose linear layers are packed integers, read as plain weights, one tensor at a time.

GPTQ's own packages bring kernels for inference on CUDA, which training doesn't need: the frozen weights are
what the integers stand for, scale * (integer - zero), so an adapter trained on these fits the packed ones.

Source: GPTQ (arXiv 2210.17323); the layout is AutoGPTQ's and GPTQModel's.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.models import shards
from lib.models.shards import whole
from lib.run.errors import StageError

ZERO = {"gptq": 1, "gptq_v2": 0}                     # {layout: what stored zero points are too small by}
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 4, 8)                                     # widths of which a word of 32 bits holds a whole number


def layout_of(settings: dict) -> str:
    """The name of a checkpoint's layout; a checkpoint that names none has GPTQ's first, "gptq"."""
    return settings.get("checkpoint_format", "gptq")


def refuse_layouts(settings: dict) -> None:
    """Raise StageError for a layout or a number of bits that isn't read here."""
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
    """transformers' arguments for loading the unpacked weights; the config no longer says they are packed."""
    from transformers import GenerationConfig
    tensors = weights(plan, config.quantization_config)
    del config.quantization_config
    beside = shards.base_file(plan, "generation_config.json")
    said = {"generation_config": GenerationConfig.from_pretrained(beside.parent)} if beside else {}
    return {"config": config, "state_dict": tensors, **said}


def weights(plan: dict, settings: dict) -> dict[str, Later]:
    """{name: tensor to be read later} of a checkpoint; a packed layer's is LAYER.weight.

    Raises OSError where a file or a part of a packed layer is missing.
    """
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
    """The weight [out, in] in bfloat16 that a layer's packed integers stand for.

    qweight [in * bits / 32, out] and qzeros [groups, out * bits / 32] are words of 32 bits, the lowest bits
    first; scales [groups, out]; g_idx [in] says to which group an input belongs.
    """
    shifts, most = torch.arange(0, 32, bits, dtype=torch.int32), 2**bits - 1
    values = (qweight[:, None, :] >> shifts[None, :, None] & most).flatten(0, 1)           # [in, out]
    zeros = (qzeros[:, :, None] >> shifts & most).flatten(1)                               # [groups, out]
    zeros, group = (zeros + zero) & most, g_idx.long()
    return (scales.float()[group] * (values - zeros[group])).T.to(torch.bfloat16).contiguous()

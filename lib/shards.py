"""shards: the .safetensors files of a model, read and written tensor by tensor.

A file is 8 bytes with the length of its header, a JSON header of names, types, shapes and offsets, and the
bytes of the tensors without gaps. The library's own writer wants all tensors of a file in memory at once.

Source: https://github.com/huggingface/safetensors#format
"""
import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie, with type and shape as the header of its file says."""
    path: Path
    start: int
    bytes: int
    dtype: str
    shape: list[int]


def base_file(plan: dict, name: str) -> Path | None:
    """A file of the base model, on this machine, or None where the base has no such file."""
    from transformers.utils import cached_file
    found = cached_file(plan["base_model"], name, revision=plan["revision"],
                        _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def weight_files(plan: dict) -> list[Path]:
    """The base's .safetensors files, in the order of their names."""
    if index := base_file(plan, INDEX):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [base_file(plan, name) for name in sorted(set(names))]
    return [base_file(plan, "model.safetensors")]


def places(path: Path) -> dict[str, Place]:
    """{tensor name: Place} of a .safetensors file, in the order of its bytes."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = tensor["data_offsets"]
        found[name] = Place(path, 8 + header_bytes + start, end - start, tensor["dtype"], tensor["shape"])
    return found


def cut(tensors: dict[str, Place], most_bytes: int) -> dict[str, dict[str, Place]]:
    """The tensors, in their order, dealt to files of at most that size (a larger tensor has its own)."""
    files, room = [], 0
    for name, place in tensors.items():
        if place.bytes > room or not files:
            files.append({})
            room = most_bytes
        files[-1][name] = place
        room -= place.bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": held for number, held in enumerate(files, 1)}


def write(path: Path, tensors: dict[str, Place], changed: Container[str], change: Callable) -> None:
    """Write a .safetensors file of these tensors, one after the other, copied or as `change(name, before)`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, place in tensors.items():
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [end, end + place.bytes]}
        end += place.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                         # the format wants the data aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, place in tensors.items():
            if name in changed:
                after = change(name, read(place))
                file.write(after.contiguous().flatten().view(torch.uint8).numpy())
            else:
                copy(place, file)


def read(place: Place) -> torch.Tensor:
    """A tensor of a file, in memory of its own."""
    content = np.fromfile(place.path, np.uint8, place.bytes, offset=place.start)
    return torch.from_numpy(content).view(TYPES[place.dtype]).view(place.shape)


def copy(place: Place, file) -> None:
    """Append a tensor's bytes to an open file."""
    with place.path.open("rb") as source:
        source.seek(place.start)
        for done in range(0, place.bytes, CHUNK_BYTES):
            file.write(source.read(min(CHUNK_BYTES, place.bytes - done)))


def write_index(path: Path, files: dict[str, dict[str, Place]]) -> None:
    """Write which tensor is in which file, or nothing where there is one file only."""
    path.unlink(missing_ok=True)
    if len(files) == 1:
        return
    total = sum(place.bytes for held in files.values() for place in held.values())
    where = {tensor: name for name, held in files.items() for tensor in sorted(held)}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n",
                    encoding="utf-8")

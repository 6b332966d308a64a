"""shards: the .safetensors files of a model, read and written tensor by tensor.

A file is 8 bytes with the length of its header, a JSON header of names, types, shapes and offsets, and the
bytes of the tensors without gaps. The library's own writer wants all tensors of a file in memory at once.

Source: https://github.com/huggingface/safetensors#format
"""
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
         "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
INDEX = "model.safetensors.index.json"
SYNC_BYTES = 2**25                               # written, before they are flushed while more are computed
PIECE_BYTES = 2**20                              # of a piece: it stays in the processor's cache


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in a file, with dtype and shape as the file's header says them."""
    path: Path
    start: int
    bytes: int
    dtype: str
    shape: list[int]


def base_file(plan: dict, name: str) -> Path | None:
    """The path of a file of the base model; None where the base has no such file."""
    from transformers.utils import cached_file
    found = cached_file(plan["base_model"], name, revision=plan["revision"],
                        _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def weight_names(plan: dict) -> list[str]:
    """The names of the base's .safetensors files, and of their index if it has one."""
    if index := base_file(plan, INDEX):
        return [INDEX, *sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    return ["model.safetensors"]


def weight_files(plan: dict) -> list[Path]:
    """The paths of the base's .safetensors files, in the order of their names."""
    return [base_file(plan, name) for name in weight_names(plan) if name != INDEX]


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


def cut(tensors: dict[str, Place], most: str | int) -> dict[str, dict[str, Place]]:
    """{file: {name: Place}}: the tensors dealt to files of at most that size, such as 5GB.

    A larger tensor has a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    files = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda place: place.bytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=most).filename_to_tensors
    return {file: {name: tensors[name] for name in names} for file, names in files.items()}


def write(path: Path, tensors: dict[str, Place], content: Callable[[str, Place], Iterator]) -> None:
    """Write a .safetensors file of these tensors, in order; `content` yields the pieces of each."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, place in tensors.items():
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [end, end + place.bytes]}
        end += place.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                         # the format wants the data aligned
    with path.open("xb") as file, ThreadPoolExecutor(1) as disk:
        file.write(len(text).to_bytes(8, "little") + text)
        on_its_way, unsynced = disk.submit(file.flush), 0
        for name, place in tensors.items():
            for piece in content(name, place):
                unsynced += file.write(as_bytes(piece.contiguous()))
                if unsynced >= SYNC_BYTES and on_its_way.done():
                    on_its_way.result()                         # a disk's error is raised here
                    on_its_way, unsynced = disk.submit(os.fsync, file.fileno()), 0
        on_its_way.result()
        file.flush()
        os.fsync(file.fileno())


def rows(place: Place, most_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """The pieces of a tensor along its first axis; each overwrites the one before in memory.

    A tensor without axes is one piece.
    """
    number = place.shape[0] if place.shape else 1
    at_a_time = max(1, number * most_bytes // max(1, place.bytes))
    memory = torch.empty([min(at_a_time, number), *place.shape[1:]], dtype=TYPES[place.dtype])
    with place.path.open("rb") as file:
        file.seek(place.start)
        for first in range(0, number, at_a_time):
            piece = memory[:number - first]
            file.readinto(as_bytes(piece))
            yield piece


def whole(place: Place) -> torch.Tensor:
    """A whole tensor, read from its place in a file."""
    return next(rows(place, place.bytes)).view(place.shape)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as an array of bytes; no copy."""
    return tensor.flatten().view(torch.uint8).numpy()


def write_index(path: Path, files: dict[str, dict[str, Place]]) -> None:
    """Write the index of which tensor is in which file; with a single file, there is none."""
    path.unlink(missing_ok=True)
    if len(files) == 1:
        return
    total = sum(place.bytes for held in files.values() for place in held.values())
    where = {tensor: name for name, held in files.items() for tensor in sorted(held)}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n",
                    encoding="utf-8")

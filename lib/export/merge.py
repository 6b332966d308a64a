"""merge: the adapter folded into its base, tensor by tensor, as a model that needs no peft.

The merged files hold the base's tensors under the same names, in the same order, dtypes and shapes. A tensor
without an adapter is copied; any other is read, added up in float32 and rounded once. So memory holds one
tensor at a time, or the one parameter that several are stacked into when a model is loaded, as experts are.

Source: LoRA (arXiv 2106.09685), section 4.1: W + (alpha / r) B A costs nothing at inference.
"""
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch

from lib import quant, registry
from lib.models import model, shards
from lib.models.plan import on_meta, planned_config, quiet, refuse_broken_files
from lib.models.roles import base_name
from lib.models.saved import attach
from lib.run import terminal

FILES_AT_A_TIME = 2                                  # one is computed while another is written
BESIDE = ("config.json", "generation_config.json", shards.INDEX)


def write_merged(plan: dict, adapter_path: Path, folder: Path, max_shard_size: str | None = None) -> None:
    """Write the merged model: files, index and configuration as the base has them.

    max_shard_size: the largest file, in place of the base's own files. A base that is quantised for training
    is merged into its original weights.
    """
    dtype, plan = plan["dtype"], quant.unquantised(plan) | {"dtype": "float32"}
    refuse_broken_files(Path(plan["base_model"]))
    files = {path.name: shards.places(path) for path in shards.weight_files(plan)}
    tensors = {name: place for held in files.values() for name, place in held.items()}
    reason = f"its weights become {dtype}" if plan["stored_as"] else ""
    sums = None if reason else Sums(plan, adapter_path, tensors)
    if reason := reason or sums.refusal:
        terminal.say(f"merging in memory, the model as a whole: {reason}")
        return write_from_memory(plan, dtype, adapter_path, folder, max_shard_size)
    folder.mkdir()
    files = {file: {name: sums.place(name) for name in held} for file, held in files.items()}
    if max_shard_size:
        files = shards.cut({name: sums.place(name) for name in tensors}, max_shard_size)
    # Each adds up in one thread: so the sums are the same to the bit, however many cores there are.
    with ThreadPoolExecutor(FILES_AT_A_TIME, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda name: shards.write(folder / name, files[name], sums.content), files))
    beside = [shards.base_file(plan, name) for name in BESIDE]
    code = beside[0].parent.glob("*.py") if plan["trust_remote_code"] else ()
    for path in filter(None, (*beside, *code)):
        shutil.copyfile(path, folder / path.name)
    if max_shard_size or plan["grown_to"]:
        shards.write_index(folder / shards.INDEX, files)
    if plan["text_config"] or plan["grown_to"]:        # the base's own would be read as if unchanged
        config = planned_config(plan)
        config.get_text_config().vocab_size = plan["grown_to"] or config.get_text_config().vocab_size
        config.save_pretrained(folder)


def write_from_memory(plan: dict, dtype: str, adapter_path: Path, folder: Path, max_shard_size: str | None):
    """Write the merged model from a whole one in float32, where files and model don't share their tensors."""
    base = model.load(plan, torch.device("cpu"))
    merged = attach(base, adapter_path, trainable=False).merge_and_unload()
    for parameter in merged.parameters():
        parameter.checkpoint_dtype = getattr(torch, dtype)
    merged.config.dtype = getattr(torch, dtype)
    model.save_full(merged, folder, max_shard_size)


# ---- what the adapter adds ----

class Sums:
    """The tensors of the base's files to which an adapter adds something, and their sums.

    Files and model may name and shape a tensor differently: transformers renames tensors and stacks experts
    when it loads them. What an adapter adds is converted back by transformers' own code for saving models.

    refusal: why sums can't be made tensor by tensor; "" where they can.
    """

    def __init__(self, plan: dict, adapter_path: Path, tensors: dict[str, shards.Place]):
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        base, self.stored, self.tensors = without_memory(plan), loaded_on_meta(plan, tensors), tensors
        names = {id(parameter): name for name, parameter in base.named_parameters()}
        self.layers: dict[str, tuple] = {}           # {tensor: (layer, its parameter's name, if unconverted)}
        self.waiting: dict[str, torch.Tensor] = {}   # {tensor: what is added to it}, until it is its turn
        self.rows: dict[str, object] = {}            # {tensor: layer with rows of new tokens}
        self.refusal, self.lock = "", Lock()
        for path, layer in attach(base, adapter_path, trainable=False).named_modules():
            if isinstance(layer, TrainableTokensLayer):
                parts = self.in_files(f"{base_name(path)}.weight", torch.empty(0, device="meta"))
                self.rows |= {part: layer for part in parts if part in tensors}
                if not layer.tied_adapter and not parts.keys() <= tensors.keys():  # a tied head is in no file
                    self.refusal = f"the files hold {base_name(path)} together with other parameters"
            if isinstance(layer, LoraLayer):
                name, empty = names[id(weight_of(layer))], torch.empty(weight_of(layer).shape, device="meta")
                parts = self.in_files(name, empty)
                as_it_is = [part is empty for part in parts.values()] == [True]
                if any(part not in tensors or list(found.shape) != tensors[part].shape
                       for part, found in parts.items()):
                    self.refusal = f"the files hold {name} together with other parameters"
                elif layer.lora_variant and not as_it_is:
                    self.refusal = f"DoRA scales {name}, which the files hold in another shape"
                self.layers |= {part: (layer, name, as_it_is) for part in parts}

    def in_files(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: tensor} in the base's files for a parameter of the model, or for what is added to it."""
        from transformers.core_model_loading import revert_weight_conversion
        return revert_weight_conversion(self.stored, {name: parameter})

    def content(self, part: str, place: shards.Place) -> Iterator[torch.Tensor]:
        """A tensor of the merged files, in pieces: the base's own, or its sum in the base's dtype."""
        from peft.tuners.lora import Linear
        layer, name, as_it_is = self.layers.get(part, (None, "", True))
        if part in self.rows:
            yield with_rows(self.rows[part], shards.whole(self.tensors[part]))
        elif layer is None:
            yield from shards.rows(place)
        elif as_it_is and type(layer) is Linear and not layer.lora_variant:
            yield from added_by_rows(layer, shards.rows(place))
        else:
            with self.lock:                                     # a layer holds one weight at a time
                before = shards.whole(place)
                total = self.sum_of(layer, part, before.float()).to(before.dtype)
            yield total

    def place(self, part: str) -> shards.Place:
        """The Place of a merged tensor: the base's, but as large as the merged one, if it has grown."""
        place = self.tensors[part]
        rows = len(weight_of(self.rows[part])) if part in self.rows else None
        return place if rows is None else replace(place, shape=[rows, *place.shape[1:]],
                                                  bytes=place.bytes // place.shape[0] * rows)

    def sum_of(self, layer, part: str, before: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor, given in float32, and what the adapter adds to it."""
        _, name, as_it_is = self.layers[part]
        if as_it_is:
            return merged(layer, before)
        if part not in self.waiting:
            self.waiting |= self.in_files(name, merged(layer, torch.zeros(weight_of(layer).shape)))
        return before + self.waiting.pop(part)


def loaded_on_meta(plan: dict, tensors: dict[str, shards.Place]):
    """The model on meta as transformers loads it from these tensors; it remembers how they were converted."""
    config = planned_config(plan)
    empty = {name: torch.empty(place.shape, device="meta") for name, place in tensors.items()}
    with quiet():
        stored, info = registry.model_class(config, plan["class"]).from_pretrained(
            None, config=config, state_dict=empty, device_map={"": "meta"}, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True)
    model.refuse_other_tensors(plan, info)
    return stored


def without_memory(plan: dict):
    """The model on the CPU with weights of full shape but no memory: each is a single zero, expanded."""
    return on_meta(plan)._apply(lambda tensor: tensor.new_zeros((), device="cpu").expand(tensor.shape))


def weight_of(layer) -> torch.nn.Parameter:
    """The base's parameter that a layer of peft adapts."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


@torch.no_grad()
def with_rows(layer, weight: torch.Tensor) -> torch.Tensor:
    """A weight [rows, D] of the files, grown to the rows that the layer has, with those of new tokens."""
    (name,) = layer.active_adapters
    grown = weight.new_empty([len(weight_of(layer)), *weight.shape[1:]])
    grown[:len(weight)] = weight
    grown[layer.token_indices[name]] = layer.trainable_tokens_delta[name].to(weight.dtype)
    return grown


@torch.no_grad()
def added_by_rows(layer, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces of a weight [out, in], each with what a plain LoRA layer adds to it, in the piece's dtype.

    All sums use the same memory: fresh pages for each would cost as much time as the sums.
    """
    (name,) = layer.active_adapters
    low, high, row, memory = layer.lora_A[name].weight, layer.lora_B[name].weight, 0, None
    for piece in pieces:
        row += len(piece)
        memory = torch.empty(piece.shape) if memory is None else memory
        total = memory[:len(piece)].copy_(piece)
        yield piece.copy_(total.addmm_(high[row - len(piece):row], low, alpha=layer.scaling[name]))


@torch.no_grad()
def merged(layer, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with the adapter merged into it, by peft itself, which changes `weight` in place."""
    parameter = weight_of(layer)
    nothing, parameter.data = parameter.data, weight
    layer.merge()
    layer.merged_adapters.clear()
    weight, parameter.data = parameter.data, nothing
    return weight

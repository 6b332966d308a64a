"""forecast: the memory that training takes on each GPU, from a configuration alone, before one is rented.

05's own step (model, adapter, fast paths, loss, backward) runs once on hollow tensors (hollow.py), which have
shapes but no memory, with the longest row of 02; the bytes that real tensors would take are counted. No
weights are read and none are made.

Fork me to: forecast another optimizer (`HollowStep.__init__` makes its state), or more kinds of GPUs.
"""
import contextlib
import functools
import re
from collections import Counter
from dataclasses import dataclass
from unittest.mock import patch

import torch

from lib import fast, quant
from lib.fast import adapted, attention, blocks
from lib.memory import hollow, on_cuda
from lib.models import adapter, model, saved
from lib.models.plan import on_meta, quiet
from lib.models.roles import Roles, base_name
from lib.training import loss, parallel

FLOAT32 = 4                               # bytes
WORKSPACES = 2 * 2**25                    # bytes: cuBLAS's on a Hopper, a forward's and a backward's
TOWERS = ("vision", "audio")


@dataclass(frozen=True)
class Peak:
    """The bytes of a training step on one GPU that holds everything.

    weights: frozen ones, by role and dtype. activations: all else, at their highest. phases: {part of a step:
    the most at any time in it}. layers, layer: frozen weights of all language layers, and of the largest one.
    """
    weights: dict[str, int]
    trained: int
    gradients: int
    optimizer: int
    activations: int
    phases: dict[str, int]
    layers: int
    layer: int

    def of(self, ranks: int) -> int:
        """The peak where each of several ranks holds everything, with a bucket to sum gradients in."""
        bucket = min(self.gradients, parallel.BUCKET * FLOAT32) if ranks > 1 else 0
        return max(*self.phases.values(), self.phases["update"] + bucket)

    def sharded(self, ranks: int) -> int:
        """The peak where frozen layers are sharded over ranks (sharding.py): two at a time are whole."""
        return self.of(ranks) - self.layers + self.layers // ranks + 2 * self.layer


class HollowStep:
    """A plan's training step on hollow tensors, with the knobs of 04 and 05, as a GPU or a CPU runs it."""

    def __init__(self, plan: dict, knobs, cuda: bool = True):
        self.knobs, self.cuda, self.roles = knobs, cuda, Roles.of_plan(plan)
        self.half = None if plan["dtype"] == "float32" else getattr(torch, plan["dtype"])
        net = on_meta(plan).requires_grad_(False)
        keep_in_float32(net)
        few_bits = in_few_bits(net, plan)
        if knobs.adapter is None:
            model.train_roles(net, self.roles, knobs.train_roles, knobs.unfrozen_parameters)
        else:
            with doras_weights():
                net, _ = adapter.put_on(net, plan, saved.continued(knobs), real=False)
            for parameter in model.trained_parameters(net).values():
                parameter.data = parameter.data.float()
        pack(few_bits)
        self.net, self.count = net.train(), hollow.Hollow(on_cuda.taken_on_cuda if cuda else int)
        self.count.fill(net)
        self.trained = model.trained_parameters(net)
        moments = sum(moments_bytes(p.numel(), knobs.optimizer) for p in self.trained.values())
        self.moments, self.workspaces = (
            self.count.tensor(torch.empty(size, dtype=torch.uint8, device="meta"))
            for size in (moments, WORKSPACES if cuda else 0))
        self._watch()

    def _watch(self) -> None:
        """Set hooks that tell the phases of a step apart, and note when gradients are made."""
        for name, module in self.net.named_modules():
            role = self.roles.paths.get(base_name(name))
            if role in TOWERS:
                self.count.watch(module, f"{role} forward")
        self.count.watch(self.net.get_output_embeddings(), "loss")
        for parameter in self.trained.values():
            parameter.register_post_accumulate_grad_hook(self._gradient_made)

    def _gradient_made(self, parameter: torch.nn.Parameter) -> None:
        if parameter not in self.learnt:
            self.learnt.add(parameter)
            self.count.aside_bytes += self.count.taken(parameter.nbytes)

    def peak(self, batch: dict[str, torch.Tensor], checkpointing: bool) -> Peak:
        """The peak of a step with this batch: the second step, when the optimizer has its state."""
        count, roles = self.count, {self.roles.of(name) for name in self.trained}
        for _, layer in self.roles.layers(self.net):
            layer.gradient_checkpointing = False
        if checkpointing:
            model.checkpoint_trained_layers(self.net, self.roles, roles)
        batch = {key: count.tensor(value) if isinstance(value, torch.Tensor) and value.is_floating_point()
                 else value for key, value in batch.items()}
        self.learnt: set[torch.nn.Parameter] = set()
        count.phase, count.aside_bytes = "", 0
        count.start_again()
        count.add(batch)
        with fast.paths(self.net, self.roles, self.cuda), self._kernels(), count:
            for _ in range(min(2, self.knobs.gradient_accumulation_steps)):
                count.enter("language forward")
                with torch.autocast("cpu", self.half, enabled=self.half is not None):
                    total, _ = loss.forward_loss(self.net, batch)
                count.enter("backward")
                total.backward()
        del total, _
        gradients = sum(count.taken(p.nbytes) for p in self.trained.values())
        phases = dict(count.phases_bytes)
        copies = gradients if self.knobs.optimizer == "adamw_torch" else 0
        phases["update"] = count.live_bytes + copies
        for p in self.trained.values():
            p.grad = None
        return self._as_peak(phases, gradients)

    def _as_peak(self, phases: dict[str, int], gradients: int) -> Peak:
        """The Peak, of the bytes that were counted."""
        taken, weights = self.count.taken, Counter()
        trained = sum(taken(p.nbytes) for p in self.trained.values())
        for name, p in self.net.named_parameters():
            if not p.requires_grad:
                kind = "quantised" if p.dtype == torch.uint8 else str(p.dtype).removeprefix("torch.")
                weights[f"{self.roles.of(name)} {kind}"] += taken(p.nbytes)
        moments, held = taken(self.moments.nbytes), sum(weights.values()) + trained
        sizes = [sum(taken(p.nbytes) for p in layer.parameters() if not p.requires_grad)
                 for role, layer in self.roles.layers(self.net) if role == "language"]
        phases = {phase: size for phase, size in phases.items() if phase}
        activations = self.count.most_besides_bytes - held - moments
        return Peak(dict(weights), trained, gradients, moments, activations, phases,
                    layers=sum(sizes), layer=max(sizes, default=0))

    @contextlib.contextmanager
    def _kernels(self):
        """Inside, quantised weights count their packed bytes, and for a GPU everything takes CUDA's way.

        That is: its kernels' memory, what fast/attention.py and training/loss.py choose there, and CUDA's
        autocast, for which peft asks.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.multiple(adapted, dequantised=unpacked))
            stack.enter_context(doras_weights())
            if self.cuda:
                stack.enter_context(on_cuda.cuda_kernels())
                stack.enter_context(patch.multiple(attention, flash_is_on=lambda device: True))
                stack.enter_context(patch.multiple(blocks, are_here=lambda query: False))
                stack.enter_context(patch.multiple(loss, CHUNK_LOGITS={}, WIDE_LOGITS={}))
                stack.callback(torch.set_autocast_enabled, "cuda", False)
                torch.set_autocast_enabled("cuda", self.half is not None)
            yield


def moments_bytes(elements: int, optimizer: str) -> int:
    """The bytes that AdamW keeps for a tensor: two floats per element, or in 8 bits two bytes per element.

    In 8 bits, two scales per 256 elements are added. A user's own optimizer counts as AdamW.
    """
    if not optimizer.endswith("8bit") or elements < 4096:
        return 2 * FLOAT32 * elements
    return 2 * (elements + FLOAT32 * -(-elements // 256))


# ---- the model ----

def keep_in_float32(net) -> None:
    """Make float32 on meta, too, what loading leaves in float32."""
    for part in net._keep_in_fp32_modules_strict or ():
        for name, parameter in net.named_parameters():
            if re.search(rf"(^|\.){part}(\.|$)", name):
                parameter.data = parameter.data.float()


def in_few_bits(net, plan: dict) -> list[torch.nn.Module]:
    """The layers of a model on meta that the plan quantises, now replaced by bitsandbytes' classes."""
    if not plan["quantisation"]:
        return []
    from transformers.quantizers import AutoHfQuantizer
    quantiser = AutoHfQuantizer.from_config(quant.configuration(plan), pre_quantized=False)
    with quiet():
        quantiser.preprocess_model(model=net, device_map={"": "cpu"}, dtype=net.dtype)
        quantiser.postprocess_model(net)
    net.requires_grad_(False)
    return [net.get_submodule(name) for name in quant.found_linears(net)]


def pack(layers: list[torch.nn.Module]) -> None:
    """Make the layers' weights take as many bytes as bitsandbytes' do, and their forwards as much memory."""
    for layer in layers:
        shape, elements = tuple(layer.weight.shape), layer.weight.numel()
        if hasattr(layer, "compute_dtype"):
            scales = -(-elements // 64)                              # one for each block
            nested = layer.weight.compress_statistics
            size = -(-elements // 2) + (scales + FLOAT32 * -(-scales // 256) if nested else FLOAT32 * scales)
        else:
            size = elements + FLOAT32 * shape[0]
        layer.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
        layer.quant_state = shape, getattr(layer, "compute_dtype", None)
        layer.forward = functools.partial(packed_forward, layer, shape)


def packed_forward(layer, shape: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
    """A packed layer's output [..., out], which takes as much memory as bitsandbytes' would."""
    four = hasattr(layer, "compute_dtype")
    wide = (layer.compute_dtype if four else None) or x.dtype
    out = on_cuda.FewBits.apply(x.to(wide), layer.weight, shape, not four)
    return (out if layer.bias is None else out + layer.bias.to(wide)).to(x.dtype)


def doras_weights():
    """Inside, DoRA, which asks for norms of the base's weights, gets quantised ones as empty matrices."""
    from peft.tuners.lora import dora

    def weight_of(layer) -> torch.Tensor:
        if not isinstance(packing := getattr(layer, "quant_state", None), tuple):     # not packed (yet)
            return layer.weight.data if layer.weight.is_floating_point() else layer.weight.data.bfloat16()
        return layer.weight.new_empty(packing[0], dtype=packing[1] or torch.bfloat16)
    return patch.multiple(dora, dequantize_module_weight=weight_of, deepcopy=lambda layer: layer)


def unpacked(weight: torch.Tensor, packing: tuple) -> torch.Tensor:
    """The matrix [out, in] that a packed weight is dequantised to."""
    shape, dtype = packing
    return weight.new_empty(shape, dtype=dtype)

"""model: from a plan to the loaded model, with what trains: an adapter, or roles of the model itself.

Scripts 03 to 06 load models through here, by the plan (plan.py), and each load is compared with it.
"""
import contextlib
import functools
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from lib import quant, registry
from lib.models import adapter, gptq, kernels, origin, shards
from lib.models.plan import on_meta, planned_config, quiet, refuse_broken_files
from lib.models.roles import Roles
from lib.models.saved import attach, continued
from lib.run import terminal
from lib.run.errors import StageError, first_line
from lib.text import vocabulary
from lib.training import devices


# ---- loading ----

def load(plan: dict, device: torch.device, mode: str = "train", adapter_path: Path | None = None,
         spread: dict | None = None):
    """The plan's model on `device`, frozen, with the adapter of a folder on it, if one is named.

    mode: "train" is train mode with an adapter that trains; "inference" is eval mode. spread: transformers'
    arguments that place parts on several GPUs (`devices.spread`) in place of `device`. Raises StageError for
    missing, misshapen or unexpected tensors, and where other layers are quantised than planned.
    """
    family = registry.family_of(plan["model_type"])
    registry.refuse_cuda_packages(family, device.type)
    config = planned_config(plan)
    refuse_broken_files(origin.fetch(plan["base_model"], plan["revision"], shards.weight_names(plan)))
    cls = registry.model_class(config, plan["class"])
    attention = kernels.here(plan["attn_implementation"], torch.cuda.is_available())
    if attention != plan["attn_implementation"]:
        terminal.say("attn_implementation: this machine lacks what is asked; sdpa gives the same")
    options = {"config": config, "dtype": getattr(torch, plan["dtype"]), "attn_implementation": attention,
               "revision": plan["revision"], "trust_remote_code": plan["trust_remote_code"],
               "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        # Asked of the files: what full fine-tuning exported is no longer stored as its base was.
        if quantisation := quant.configuration(plan | {"stored_as": quant.stored_as(config)}):
            options |= {"quantization_config": quantisation, "device_map": {"": str(device)}}
        path = plan["base_model"]
        if quant.stored_as(config) == "gptq":
            path, options = None, options | gptq.in_place_of_files(plan, config)
        with quiet(), devices.freed_at_once() if quantisation else contextlib.nullcontext():
            model, info = cls.from_pretrained(path, **options | (spread or {}))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        fix = ("install that package" if isinstance(error, ImportError) else
               "see that the folder or model id holds all of its .safetensors files")
        raise StageError(f"base_model: {plan['base_model']}: {first_line(error)}", fix) from None
    refuse_other_tensors(plan, info)
    with quiet():
        vocabulary.grow(model, plan["new_rows"])
    if plan["quantisation"]:
        quant.refuse_unplanned(model, plan)
        quant.keep_gradients(model)
    if spread:
        devices.refuse_offload(model.hf_device_map)
    elif not plan["quantisation"]:
        model.to(device)
    model.requires_grad_(False)
    if family.uncast:
        model.get_submodule(family.uncast).register_forward_pre_hook(cast_to_own_type)
    if adapter_path:
        model = attach(model, adapter_path, trainable=mode == "train")
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            keep_statistics(module)
    return model.train(mode == "train")


def keep_statistics(module: torch.nn.Module) -> None:
    """Make a batch norm use the checkpoint's means and variances in training, too.

    Otherwise a sample's loss would depend on the others in its batch, and the means would move, which no
    adapter holds.
    """
    module.eval()
    module.train = lambda mode=True: module


def cast_to_own_type(module, given: tuple) -> tuple:
    """A module's arguments, those in floating point cast to the dtype of its weights."""
    return tuple(each.to(module.dtype) if each.is_floating_point() else each for each in given)


def refuse_other_tensors(plan: dict, info: dict) -> None:
    """Raise StageError unless checkpoint and model hold the same tensors in the same shapes."""
    path, unread = plan["base_model"], "|".join(registry.family_of(plan["model_type"]).unread) or r"(?!)"
    for kind in ("missing_keys", "mismatched_keys"):
        if odd := sorted(map(str, info[kind])):
            raise StageError(f"base_model: {path}: {len(odd)} {kind.replace('_', ' ')}, such as {odd[0]}",
                             "the checkpoint is damaged or of another class")
    if extra := sorted(key for key in info["unexpected_keys"] if not re.fullmatch(unread, key)):
        quant.refuse_unread_scales(path, extra)
        raise StageError(f"base_model: {path}: {len(extra)} unexpected keys, such as {extra[0]}",
                         f"{plan['class']} may be the wrong class; if it can do without them, its record in "
                         "lib/models/families.py says so (`unread`)")


def refuse_unplanned(parameters: dict[str, torch.nn.Parameter], roles: Roles,
                     planned: dict[str, int]) -> None:
    """Raise StageError, naming both sides, where what trains is not what 04 planned, role by role."""
    here, planned = roles.count(parameters.items()), Counter(planned)
    for role in sorted(here.keys() | planned.keys()):
        if here[role] != planned[role]:
            raise StageError(f"05_train would train {here[role]:,} parameters of role {role}, "
                             f"04_lora planned {planned[role]:,}", "run 04_lora.py again with --force")


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of everything that trains, a tied tensor once; StageError where nothing does."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise StageError("nothing would train: no parameter requires a gradient",
                         "check adapter, lora_target_roles and train_roles")
    return trained


def checkpoint_trained_layers(model, roles: Roles, trained_roles: set[str], kept_share: float = 0.0,
                              offload: bool = False) -> int:
    """Turn on gradient checkpointing in the layers of these roles and of language; return their number.

    Language counts even where it is frozen, since the gradients of whatever trains pass through it. The last
    layers keep their activations, kept_share of all and at least one: their backward is the first to run.
    transformers' own switch isn't used: it makes every input embedding require gradients, a frozen tower's
    included, which would then build a graph and run twice. Checkpoints are non-reentrant (PyTorch docs,
    torch.utils.checkpoint). offload: a checkpointed layer's input, which it keeps, waits in host memory.
    """
    layers = [layer for layer in roles.layers(model) if layer[0] in {*trained_roles, "language"}]
    layers.sort(key=lambda layer: layer[0] == "language")                        # language's are the last
    layers = [module for _, module in layers[:len(layers) - max(1, int(kept_share * len(layers)))]]
    for module in layers:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = functools.partial(checkpointed, offload)
    return len(layers)


def checkpointed(offload: bool, function, *args):
    """The result of a layer's `function`; only args are kept, from which the backward computes it again."""
    host = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    with host if offload else contextlib.nullcontext():
        return checkpoint(function, *args, use_reentrant=False)


# ---- full fine-tuning ----

def trains(name: str, roles: Roles, wanted: list[str], named: list[str] | None = None) -> bool:
    """Whether full fine-tuning trains a parameter: of a wanted role, and matched by `named`, if it is given.

    As in Axolotl, a regex is matched from the name's start, and a plain dot in it means a dot.
    """
    of_role = wanted == ["all"] or roles.of(name) in wanted
    return of_role and (named is None or any(
        re.match(re.sub(r"(?<!\\)\.(?![*+?{])", r"\.", regex), name) for regex in named))


def train_roles(model, roles: Roles, wanted: list[str], named: list[str] | None = None) -> None:
    """Make the parameters that `trains` names train, in float32: bf16 would round small updates away.

    Those that no loss depends on don't train, but become float32, too, since they may still be computed with.
    """
    for name, parameter in model.named_parameters():
        if trains(name, roles, wanted, named):
            parameter.checkpoint_dtype = parameter.dtype
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not roles.is_idle(name))


def as_stored(model):
    """The model, with each parameter cast in place to the dtype that it has in the base and in exports.

    Only parameters are cast: `model.to(bfloat16)` would also round buffers, such as the rope's frequencies.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(parameter, "checkpoint_dtype", parameter.dtype))
    return model


def save_full(model, folder: Path, max_shard_size: str | None = None) -> dict[str, torch.Tensor]:
    """{name: tensor} of the model as written to the folder; the model itself is cast (`as_stored`)."""
    as_stored(model)
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size or "50GB")
    return model.state_dict()


# ---- the adapter ----

def new_adapter(plan: dict, knobs) -> tuple[object, dict[str, list[str]]]:
    """(PEFT model with the adapter to train, {role: names of the adapted layers}).

    The base's weights are only loaded where what trains starts from them: DoRA's norms, or new rows of
    embedding and head. For these rows nothing is quantised, which would take a minute for some GiB.
    """
    knobs = continued(knobs)
    if not knobs.peft_use_dora and plan["stored_as"] != "bitsandbytes":
        plan = plan | {"quantisation": None}
    known = knobs.peft_use_dora or plan["new_rows"]
    base = load(plan, torch.device("cpu")) if known else on_meta(plan)
    return adapter.put_on(base, plan, knobs)

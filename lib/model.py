"""model: from a recipe to a plan (on meta tensors, true on every machine) and from a plan to the loaded model.

The plan is 03's model.json. Scripts 04, 05 and 06 load by it and by nothing else, and each load is compared with it.
"""
import contextlib
import functools
import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from lib import quant, registry
from lib.registry import Roles
from lib.stage import StageError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets kernels that nobody here needs


# ------------------------------------------------------------------------------------------------ the plan

def make_plan(knobs) -> dict:
    """The plan of a recipe: class, revision, dtype, quantisation, roles with counts. Reads the config, no weights."""
    config = load_config(knobs.base_model, knobs.revision, knobs.trust_remote_code)
    family = registry.family_of(config.model_type)
    registry.require_packages(family)
    cls = registry.model_class(config, knobs.model_type)
    plan = {"base_model": knobs.base_model, "revision": getattr(config, "_commit_hash", None) or knobs.revision,
            "trust_remote_code": knobs.trust_remote_code, "model_type": config.model_type, "family": family.name,
            "class": cls.__name__, "dtype": "float32" if knobs.bf16 is False else "bfloat16",
            "attn_implementation": registry.attention(family, config, knobs.attn_implementation),
            "quantisation": None}
    model = on_meta(plan)
    roles = registry.roles_of(model, family)
    plan["tied_head"] = tied(model)
    plan["roles"], plan["idle"], plan["roles_guessed"] = roles.paths, roles.idle, roles.guessed
    plan["parameters"] = dict(count_parameters(model, roles))
    if knobs.load_in_4bit or knobs.load_in_8bit:
        plan["quantisation"] = {"bits": 4 if knobs.load_in_4bit else 8, "options": knobs.bnb_config_kwargs,
                                "linears": quant.quantised_linears(model, roles),
                                "kept_linears": quant.kept_linears(model, roles)}
    return plan


def load_config(base_model: str, revision: str | None, trust_remote_code: bool):
    """The checkpoint's config, or a StageError that says what is missing where."""
    from transformers import AutoConfig
    registry.refuse_unloadable(base_model)
    try:
        return AutoConfig.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        fix = ("name a folder that holds a config.json" if Path(base_model).exists() else
               "correct base_model; a gated or private model also needs `hf auth login`")
        raise StageError(f"base_model: {base_model}: no usable config ({reason})", fix) from None


def on_meta(plan: dict):
    """The plan's model without memory: every tensor on the meta device, shapes and names as loaded."""
    config = load_config(plan["base_model"], plan["revision"], plan["trust_remote_code"])
    cls = registry.model_class(config, plan["class"])
    with torch.device("meta"), quiet():
        return cls._from_config(config, dtype=getattr(torch, plan["dtype"]),
                                attn_implementation=plan["attn_implementation"])


def count_parameters(model, roles: Roles, idle: bool = True) -> Counter:
    """Parameters per role, with or without those that no forward reaches; a tied tensor counts once."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        if idle or not roles.is_idle(name):
            counts[roles.of(name)] += parameter.numel()
    return counts


def tied(model) -> bool:
    """Whether output head and input embedding share one tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------------ loading

def load(plan: dict, device: torch.device, mode: str = "train"):
    """The plan's model on `device`, everything frozen; mode "train" turns the cache off, "inference" calls eval().

    Raises StageError for missing, unexpected or differently shaped tensors, and for layers quantised otherwise
    than planned.
    """
    config = load_config(plan["base_model"], plan["revision"], plan["trust_remote_code"])
    cls = registry.model_class(config, plan["class"])
    options = {"dtype": getattr(torch, plan["dtype"]), "attn_implementation": plan["attn_implementation"],
               "revision": plan["revision"], "trust_remote_code": plan["trust_remote_code"]}
    if plan["quantisation"]:
        from transformers import BitsAndBytesConfig
        options |= {"quantization_config": BitsAndBytesConfig(**quant.plain_options(plan)),
                    "device_map": {"": str(device)}}
    try:
        with quiet():
            model, info = cls.from_pretrained(plan["base_model"], output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise StageError(f"base_model: {plan['base_model']}: {str(error).strip().splitlines()[0]}",
                         "check that the folder or model id holds all of its weight files") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise StageError(f"base_model: {plan['base_model']}: {len(info[kind])} {kind.replace('_', ' ')}, such as "
                             f"{sorted(map(str, info[kind]))[0]}", "the checkpoint is damaged or of another class")
    if plan["quantisation"]:
        quant.check(model, plan)
    else:
        model.to(device)
    model.requires_grad_(False)
    return model.eval() if mode == "inference" else model.train()


def attach(model, adapter_path: Path, trainable: bool = True):
    """The model with a saved PEFT adapter on it; its own tensors are float32 and train if asked."""
    from peft import PeftModel
    with quiet():
        return PeftModel.from_pretrained(model, str(adapter_path), is_trainable=trainable)


def train_roles(model, roles: Roles, wanted: list[str]) -> None:
    """Full fine-tuning: the parameters of these roles train, as float32 masters (bf16 ones would not move).

    What no forward's result depends on becomes float32 too, since it may still run on what the others hand it.
    """
    for name, parameter in model.named_parameters():
        if wanted == ["all"] or roles.of(name) in wanted:
            parameter.checkpoint_dtype = parameter.dtype
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not roles.is_idle(name))


def save_full(model, folder: Path) -> None:
    """Write the model with every tensor in the type that the base had it in, and leave it so.

    Only parameters are cast: `model.to(bfloat16)` would also round buffers, such as the frequencies of the rope.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(parameter, "checkpoint_dtype", parameter.dtype))
    with quiet():
        model.save_pretrained(folder)


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of everything that trains; a tied tensor once. An empty result is an error."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise StageError("nothing would train: no parameter requires a gradient",
                         "check adapter, lora_target_roles and train_roles")
    return trained


def base_name(name: str) -> str:
    """A module or parameter name as the base model has it, without PEFT's wrapping."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.default)?", "", name)


def checkpoint_trained_layers(model, roles: Roles, trained_roles: set[str]) -> int:
    """Turn on gradient checkpointing in the layers of these roles only; returns how many.

    The library's own switch also makes every input embedding require gradients, the frozen tower's included, which then
    builds a graph and runs twice. Here a frozen tower stays out. Non-reentrant (PyTorch docs, torch.utils.checkpoint).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and roles.of(base_name(name)) in trained_roles:
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            count += 1
    return count


# ------------------------------------------------------------------------------------------------ the adapter

def adapter_targets(model, roles: Roles, knobs) -> str:
    """One regular expression that matches exactly the modules LoRA adapts, from the recipe's regex, list or roles."""
    asked = knobs.lora_target_modules
    if asked is None or asked == "all-linear":
        names = registry.lora_linears(model, roles, registry.family_of(model.config.model_type),
                                     tuple(knobs.lora_target_roles))
        if not names:
            raise StageError(f"lora_target_roles: {knobs.lora_target_roles} have no linear layer in this model",
                             f"choose among {', '.join(sorted(set(roles.paths.values())))}")
        return as_regex(names)
    if isinstance(asked, list):
        asked = r"(?:.*\.)?(?:" + "|".join(re.escape(leaf) for leaf in asked) + ")"
    return asked


def as_regex(names: list[str]) -> str:
    """The shortest honest regex for these module names: layer numbers become \\d+, same prefixes are grouped."""
    shapes = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", r".\\d+", re.escape(name).replace(r"\.", ".")) for name in names)
    grouped: dict[str, list[str]] = {}
    for shape in shapes:
        stem, _, leaf = shape.rpartition(".")
        grouped.setdefault(stem, []).append(leaf)
    pieces = []
    for stem, leaves in grouped.items():
        dotted = re.sub(r"\.(?!\\d)", r"\\.", stem).replace(".\\d+", r"\.\d+")
        ends = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        pieces.append(rf"{dotted}\.{ends}" if stem else ends)
    return "|".join(pieces)


def lora_config(knobs, targets: str):
    """peft's LoraConfig for a recipe."""
    from peft import LoraConfig
    return LoraConfig(r=knobs.lora_r, lora_alpha=knobs.lora_alpha, lora_dropout=knobs.lora_dropout,
                      target_modules=targets, use_dora=knobs.peft_use_dora, use_rslora=knobs.peft_use_rslora,
                      init_lora_weights=knobs.peft_init_lora_weights, bias="none")


def adapter_hits(model, roles: Roles) -> dict[str, list[str]]:
    """Role -> names of the base modules that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    hits: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            hits.setdefault(roles.of(base_name(name)), []).append(base_name(name))
    return hits


def new_adapter(plan: dict, knobs) -> tuple[object, dict[str, list[str]]]:
    """(PEFT model whose adapter tensors are real and seeded, hits per role); the base stays on meta.

    DoRA's magnitudes are norms of the base weights, so for DoRA the base is really loaded.
    """
    from peft import get_peft_model
    needs_base = knobs.peft_use_dora
    model = load(plan, torch.device("cpu")) if needs_base else on_meta(plan)
    roles = Roles.of_plan(plan)
    targets = adapter_targets(model, roles, knobs)
    config = lora_config(knobs, targets)
    torch.manual_seed(knobs.seed)
    try:
        with quiet():
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=not needs_base)
    except ValueError as error:
        raise StageError(f"lora_target_modules: {targets!r} matches no module of {plan['class']}"
                         if "not found" in str(error) else f"adapter: peft refuses: {str(error).splitlines()[0]}",
                         "leave lora_target_modules out, or write names like "
                         + registry.lora_linears(model, roles, registry.family_of(plan["model_type"]),
                                                 ("language",))[0]) from None
    if not needs_base:
        materialise(peft_model, config)
    return peft_model, adapter_hits(peft_model, roles)


def save_adapter(peft_model, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as plain peft reads them, and nothing else.

    The trained tensors only: peft would otherwise add the embeddings when it can't look the base up on the hub.
    """
    with quiet():
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)      # peft's empty model card; 06 writes the real one


def materialise(peft_model, config) -> None:
    """Give the adapter's tensors memory on the CPU and their initial values, leaving the base on meta."""
    from peft.tuners.lora import LoraLayer
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            for parts in (module.lora_A, module.lora_B, module.lora_embedding_A, module.lora_embedding_B):
                for name in parts:
                    if isinstance(parts[name], torch.nn.Module):
                        parts[name].to_empty(device="cpu").float()
                    else:
                        parts[name] = torch.nn.Parameter(torch.empty_like(parts[name], device="cpu").float())
            module.reset_lora_parameters("default", config.init_lora_weights)


@contextlib.contextmanager
def quiet():
    """Keep the libraries' progress bars, notices and deprecations off the terminal; errors still come through."""
    from transformers.utils import logging as hf
    bars, level = hf.is_progress_bar_enabled(), hf.get_verbosity()
    hf.disable_progress_bar()
    hf.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            hf.set_verbosity(level)
            if bars:
                hf.enable_progress_bar()

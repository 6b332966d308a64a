"""quant: the linear layers of the wanted roles in bitsandbytes' 4 or 8 bits, and a check that only those are.

Of checkpoints that are quantised already, those of bitsandbytes are trained on as they are, 8-bit floats and
GPTQ's integers (lib/models/gptq.py) are read as the plan's dtype, and others are refused by name.
Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3: nf4, double quantisation, bf16 compute.
"""
from collections import Counter

import torch

from lib.models import gptq
from lib.models.roles import Roles
from lib.registry import family_of
from lib.run.errors import StageError

# ---- the plan ----

def stored_as(config) -> str | None:
    """How a checkpoint is quantised: "bitsandbytes", "fp8", "gptq" or None; StageError for other ways."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    method = own.get("quant_method", "an unnamed method")
    if method == "gptq":
        gptq.refuse_layouts(own)
    elif method not in ("bitsandbytes", "fp8"):
        raise StageError(f"base_model: its weights are quantised by {method}, which isn't trained here",
                         "name the unquantised checkpoint; adapter: qlora makes 4 bits of it")
    return method


def quantisation_of(plan: dict, config, knobs, model, roles: Roles) -> dict | None:
    """The plan's `quantisation`, or None: {bits, names of linear layers, options of bitsandbytes}.

    model: on meta; where the checkpoint itself is quantised, its layers are replaced by quantised ones.
    """
    bits = 4 if knobs.load_in_4bit else 8 if knobs.load_in_8bit else None
    if plan["stored_as"] and plan["dtype"] != "bfloat16":
        asked = "fp16: true" if knobs.fp16 else "bf16: false"
        raise StageError(f"{asked}: {plan['base_model']} is quantised, and what it holds whole is bfloat16",
                         "bf16: auto, without fp16")
    if plan["stored_as"] == "bitsandbytes":
        return stored_quantisation(config, knobs, bits, model)
    if plan["stored_as"] == "fp8" and bits:
        raise StageError(f"base_model: its weights are 8-bit floats, of which no load makes {bits} bits",
                         "adapter: lora, or name the bfloat16 checkpoint")
    if bits is None:
        return None
    linears = quantised_linears(model, roles, knobs.quantize_roles)
    if not linears:
        raise StageError(f"quantize_roles: no linear layer in {', '.join(knobs.quantize_roles)}",
                         "quantize_roles: [language]")
    kept = sorted(set(linear_names(model)) - set(linears))
    how = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "float16" if knobs.fp16 else "bfloat16",
        "bnb_4bit_compute_dtype": plan["dtype"]}
    # transformers matches these from the start of the name: "vision_tower" would skip nothing inside
    # "model.vision_tower", so every name is written out. An explicit list also replaces the default one,
    # which keeps the output head; it is among the names here.
    how |= {"llm_int8_skip_modules": kept, **knobs.bnb_config_kwargs}
    return {"bits": bits, "linears": linears, "options": how}


def stored_quantisation(config, knobs, bits: int | None, model) -> dict:
    """The plan's `quantisation` for a checkpoint of bitsandbytes, by its own settings."""
    from transformers.quantizers import AutoHfQuantizer
    own = {key: value for key, value in config.quantization_config.items()
           if key != "quant_method" and not key.startswith("_")}
    stored = 4 if own.get("load_in_4bit") else 8
    if bits not in (None, stored) or knobs.bnb_config_kwargs or knobs.quantize_roles != ["language"]:
        raise StageError(f"base_model: its weights are {stored} bits already, by settings of their own",
                         "leave out load_in_4bit, load_in_8bit, bnb_config_kwargs and quantize_roles")
    quantiser = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantiser.preprocess_model(model=model, device_map={"": "cpu"}, dtype=model.dtype)
    return {"bits": stored, "linears": sorted(found_linears(model)), "options": own}


def linear_names(model) -> list[str]:
    """Full names of the layers that transformers would quantise: torch's Linear, no subclass."""
    return [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]


def quantised_linears(model, roles: Roles, wanted=("language",)) -> list[str]:
    """Full names of the linear layers that these roles quantise; language includes its cross-attention."""
    within = {*wanted, "cross_attention"} if "language" in wanted else set(wanted)
    kept = set(family_of(model.config.model_type).no_quant)
    return [name for name in linear_names(model)
            if roles.of(name) in within and not kept & set(name.split("."))]


def in_words(plan: dict) -> list[str]:
    """Lines on a plan's quantisation: a format that is undone, layers per role, experts left unquantised."""
    lines = []
    if words := {"fp8": "in 8-bit floats", "gptq": "by GPTQ"}.get(plan["stored_as"]):
        lines.append(f"stored {words}, read as {plan['dtype']}")
    if quantisation := plan["quantisation"]:
        counts = Counter(Roles.of_plan(plan).of(name) for name in quantisation["linears"])
        per_role = ", ".join(f"{role} {count}" for role, count in sorted(counts.items()))
        lines.append(f"{counts.total()} linear layers in {quantisation['bits']} bits: {per_role}")
        if experts := plan["parameters"].get("experts"):
            gib = experts * getattr(torch, plan["dtype"]).itemsize / 2**30
            lines.append(f"{gib:.3g} GiB of experts stay in {plan['dtype']}: "
                         "bitsandbytes passes over parameters of three dimensions")
    return lines


# ---- loading ----

def arguments(plan: dict) -> tuple[str, dict] | None:
    """(class, arguments) of transformers' quantisation configuration for a plan, in plain data, or None."""
    if plan["quantisation"]:
        return "BitsAndBytesConfig", plan["quantisation"]["options"]
    return ("FineGrainedFP8Config", {"dequantize": True}) if plan["stored_as"] == "fp8" else None


def configuration(plan: dict):
    """transformers' configuration for a plan whose weights are quantised, or None."""
    import transformers
    found = arguments(plan)
    return getattr(transformers, found[0])(**found[1]) if found else None


def refuse_unread_scales(path: str, extra: list[str]) -> None:
    """Raise StageError where transformers reads no scales of 8-bit floats: the weights would stay unscaled.

    That happens with experts that are stored as one tensor; those stored one by one are rescaled.
    """
    if scales := [name for name in extra if name.endswith("_scale_inv")]:
        raise StageError(f"base_model: {path}: transformers passes over {len(scales)} scales of 8-bit "
                         f"floats, such as {scales[0]}", "name the bfloat16 checkpoint")


def unquantised(plan: dict) -> dict:
    """The plan without quantisation, for a merge; StageError where the base has no unquantised weights."""
    if plan["stored_as"] == "bitsandbytes":
        raise StageError(f"merge: the weights of {plan['base_model']} are stored quantised, so sums can't be",
                         "merge: false; the adapter works on the quantised base")
    return plan | {"quantisation": None}


def found_linears(model) -> set[str]:
    """Full names of the quantised layers in a model."""
    import bitsandbytes
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def refuse_unplanned(model, plan: dict) -> None:
    """Raise StageError unless the quantised layers are exactly those of the plan."""
    if wrong := found_linears(model) ^ set(plan["quantisation"]["linears"]):
        raise StageError(f"quantisation: {len(wrong)} layers are not as planned, such as {sorted(wrong)[0]}",
                         "run 03_load_model.py again; else the roles in lib/models/families.py are wrong")


def keep_gradients(model) -> None:
    """Stop bitsandbytes from repacking weights on CPUs with AVX512_BF16 in the first evaluation forward.

    The repacked layout has no backward: the loss looks right, and no gradient passes such a layer any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_dora_on_cpu(peft_model) -> None:
    """Raise StageError for DoRA on 8-bit weights on a CPU: reading them there, peft loses their scales."""
    for module in peft_model.modules():
        base = getattr(module, "base_layer", None)
        if (type(base).__name__ == "Linear8bitLt" and base.weight.device.type == "cpu"
                and any(module.use_dora.values())):
            raise StageError("peft_use_dora: on a CPU, peft can't compute it for weights of load_in_8bit",
                             "load_in_4bit in place of load_in_8bit, peft_use_dora: false, or a GPU")

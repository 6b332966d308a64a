"""adapter: which layers and experts get LoRA, and peft's adapter on them, even for a base without memory.

Fork me to: use another PEFT method (`lora_config`), or choose layers by another rule (`target_names`).
"""
import contextlib
import copy
import re
from pathlib import Path

import torch

from lib import registry
from lib.models import saved
from lib.models.plan import public_name, quiet
from lib.models.roles import Roles, base_name, lora_linears
from lib.run import terminal
from lib.run.errors import StageError, first_line
from lib.text import vocabulary


def put_on(model, plan: dict, knobs, real: bool = True) -> tuple[object, dict[str, list[str]]]:
    """(PEFT model with real, float32, seeded adapter tensors, {role: names of what is adapted}).

    The base may be on the meta device, and then stays there; DoRA needs a real one, since its magnitudes are
    norms of the base's weights. If not `real`, the adapter of a base on meta stays there, too.
    """
    from peft import get_peft_model
    roles, hollow = Roles.of_plan(plan), model.device.type == "meta"
    if knobs.lora_model_dir:
        saved.refuse_foreign(model, Path(knobs.lora_model_dir))
    names, experts = target_names(model, roles, knobs), expert_names(model, roles, knobs)
    rows = vocabulary.trained(model, plan)
    if both := sorted({*names} & {*(rows or ())}):
        raise StageError(f"lora_target_roles, lora_target_modules: {both[0]} can't have LoRA, since its rows "
                         "of new tokens train", "leave embedding and head out")
    if plan["tied_head"]:
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        if tied := [name for name in names if model.get_submodule(name) in ends]:
            raise StageError(f"lora_target_roles, lora_target_modules: {tied[0]} shares its weight, head and "
                             f"embedding of {plan['class']}: merged, LoRA on one would change both",
                             "leave embedding and head out; full fine-tuning trains them as one")
    targets = as_regex(names, [name for name, _ in model.named_modules()]) if names else []
    parameters = as_ends(experts, [name for name, _ in model.named_parameters()])
    config = lora_config(knobs, targets, parameters, rows)
    if widened(model, config, names):
        targets = config.target_modules = names
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(knobs.seed)
        try:
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=hollow)
        except ValueError as error:
            fix = f"name other layers in lora_target_modules, such as {default_names(model, roles)[0]}"
            raise StageError(f"adapter: peft refuses: {first_line(error)}", fix) from None
        if hollow and real:
            materialise(peft_model, config)
        if knobs.lora_model_dir and real:
            saved.fill(peft_model, Path(knobs.lora_model_dir))
    # peft would write the folder the base was loaded from, which is of no use to others and may say too much,
    # and for some families sets in place of regex and list, which have another order in every process.
    config.base_model_name_or_path, config.revision = public_name(plan), plan["revision"]
    config.target_modules, config.target_parameters = targets, parameters
    if rows and isinstance(peft_model.get_output_embeddings(), torch.nn.Linear):
        raise StageError(f"tokens: peft doesn't see that the head of {plan['class']} is its embedding",
                         "use words that the tokenizer has")
    hits = adapter_hits(peft_model, roles)
    if odd := {*names, *experts} ^ {name for found in hits.values() for name in found}:
        raise StageError(f"adapter: peft adapts other layers than asked, such as {sorted(odd)[0]}",
                         "name only attention layers in lora_target_modules")
    return peft_model, hits


def target_names(model, roles: Roles, knobs) -> list[str]:
    """Full names of the modules that LoRA adapts, by the recipe's regex, list of last names, or roles.

    A regex has to match the full name, as in peft. Norms, modules that only hold others, and modules that no
    forward reaches are never adapted.
    """
    asked = knobs.lora_target_modules
    if asked is None:
        family = registry.family_of(model.config.model_type)
        names = lora_linears(model, roles, family, tuple(knobs.lora_target_roles))
        if not names and not by_role(knobs):
            raise StageError(f"lora_target_roles: no linear layer in {', '.join(knobs.lora_target_roles)}",
                             f"choose among {', '.join(sorted(set(roles.paths.values())))}")
        if without := set(knobs.lora_target_roles) - {roles.of(name) for name in names} - {"experts"}:
            terminal.warn(f"lora_target_roles: no linear layer in {', '.join(sorted(without))}")
        return names
    pattern = asked if isinstance(asked, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, asked))})"
    names = [name for name, module in model.named_modules() if re.fullmatch(pattern, name)
             and getattr(getattr(module, "weight", None), "ndim", 0) >= 2]
    reached = [name for name in names if not roles.is_idle(name)]
    if len(reached) < len(names):
        terminal.say(f"left out: {len(names) - len(reached)} layers that no forward reaches")
    if not reached:
        raise StageError(f"lora_target_modules: {asked!r} matches no layer of {type(model).__name__}",
                         f"leave it out, or write names like {default_names(model, roles)[0]}")
    return reached


def expert_names(model, roles: Roles, knobs) -> list[str]:
    """Full names of the experts' parameters that LoRA adapts: 3-D ones, which hold a matrix for each expert.

    The role `experts` asks for all of them, lora_target_parameters for those whose names end as it says.
    """
    ends = knobs.lora_target_parameters or []
    if not ends and not by_role(knobs):
        return []
    knob, fix = (("lora_target_parameters", "leave it out") if ends else
                 ("lora_target_roles", "leave experts out"))
    there = [name for name, parameter in model.named_parameters()
             if parameter.ndim == 3 and roles.of(name) == "experts"]
    family = registry.family_of(model.config.model_type)
    if not ends and lora_linears(model, roles, family, ("experts",)):
        return there                               # experts that are linear layers, each for itself
    if reason := family.expert_lora or ("" if there else "this checkpoint has no experts in 3-D parameters"):
        raise StageError(f"{knob}: {family.name}: {reason}", fix)
    for end in ends:
        if not any(name_ends(name, end) for name in there):
            raise StageError(f"{knob}: {end!r} matches no experts of {type(model).__name__}",
                             f"write {', '.join(as_ends(there, there))}")
    return [name for name in there if by_role(knobs) or any(name_ends(name, end) for end in ends)]


def by_role(knobs) -> bool:
    """Whether a recipe asks for all experts, by their role."""
    return knobs.lora_target_modules is None and "experts" in knobs.lora_target_roles


def name_ends(name: str, end: str) -> bool:
    """Whether a parameter's name ends with these whole parts, which is how peft matches."""
    return f".{name}".endswith(f".{end}")


def default_names(model, roles: Roles) -> list[str]:
    """Full names of the layers that LoRA adapts by default: those of the language role."""
    return lora_linears(model, roles, registry.family_of(model.config.model_type), ("language",))


def as_regex(names: list[str], among: list[str]) -> str:
    """A regex for exactly these of a model's module names: a number becomes \\d+ where that hits no other."""
    short = "|".join(grouped(names, r"\d+"))
    exact = {name for name in among if re.fullmatch(short, name)} == set(names)
    return short if exact else "|".join(grouped(names))


def widened(model, config, names: list[str]) -> bool:
    """Whether peft would adapt more layers than these: of some models it makes a regex the last names.

    It does so where the experts of an older transformers were linear layers, for adapters made with that one.
    """
    probe = copy.copy(config)
    # Older ones of peft take every regex as it is; what peft refuses, it refuses again in `put_on`.
    with contextlib.suppress(ImportError, ValueError):
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        convert_peft_config_for_transformers(probe, model, None)
    if isinstance(probe.target_modules, str):
        return False
    others = {name for name, _ in model.named_modules()} - {*names}
    return any(name_ends(name, last) for name in others for last in probe.target_modules)


def grouped(names: list[str], number: str | None = None) -> list[str]:
    """One regex for all names that differ in their last part; `number` stands for every number before it."""
    last_parts: dict[str, list[str]] = {}
    for name in names:
        *path, last = name.split(".")
        stem = "".join((number if number and part.isdigit() else re.escape(part)) + r"\." for part in path)
        found = last_parts.setdefault(stem, [])
        if last not in found:
            found.append(last)
    return [stem + (f"({'|'.join(last)})" if len(last) > 1 else last[0]) for stem, last in last_parts.items()]


def as_ends(names: list[str], among: list[str]) -> list[str] | None:
    """The ends of names, such as experts.down_proj, that hit exactly these of a model's parameters."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    hit = {name for name in among if any(name_ends(name, end) for end in ends)}
    return (ends if hit == set(names) else sorted(names)) or None


def lora_config(knobs, targets: str | list, parameters: list[str] | None, rows: dict | None = None):
    """peft's LoraConfig for a recipe."""
    from peft import LoraConfig
    return LoraConfig(r=knobs.lora_r, lora_alpha=knobs.lora_alpha, lora_dropout=knobs.lora_dropout,
                      target_modules=targets, target_parameters=parameters, trainable_token_indices=rows,
                      use_dora=knobs.peft_use_dora, use_rslora=knobs.peft_use_rslora,
                      init_lora_weights=knobs.peft_init_lora_weights, bias="none")


def materialise(peft_model, config) -> None:
    """Give the adapter's tensors memory on the CPU and their initial values; the base stays on meta."""
    from peft.tuners.lora import LoraLayer
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            for name, part in module.named_children():
                if name.startswith("lora_"):
                    part.to_empty(device="cpu").float()
            module.reset_lora_parameters("default", config.init_lora_weights)


def adapter_hits(peft_model, roles: Roles) -> dict[str, list[str]]:
    """{role: names of the base's modules and of the experts' parameters that carry an adapter}."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    hits: dict[str, list[str]] = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            hit = base_name(name)
            if isinstance(module, ParamWrapper):   # one for each parameter, nested in one another
                hit += f".{module.parameter_name}"
            hits.setdefault(roles.of(hit), []).append(hit)
    return hits


def adapted_experts(peft_model) -> int:
    """How many experts carry an adapter, over all layers."""
    from peft.tuners.lora import ParamWrapper
    return sum({base_name(name): module.num_experts for name, module in peft_model.named_modules()
                if isinstance(module, ParamWrapper)}.values())

"""adapter: which layers get LoRA, and peft's adapter on them, made on a base that may be on meta.

Fork me to: use another PEFT method (`lora_config`), or choose layers by another rule (`target_names`).
"""
import re

import torch

from lib import registry, terminal
from lib.plan import public_name, quiet
from lib.processor import first_line
from lib.roles import Roles, lora_linears
from lib.stage import StageError


def put_on(model, plan: dict, knobs) -> tuple[object, dict[str, list[str]]]:
    """(PEFT model whose adapter tensors are real, float32 and seeded, role -> names of the layers hit).

    The base may be on meta and then stays there, but for DoRA, whose magnitudes are norms of its weights.
    """
    from peft import get_peft_model
    roles, hollow = Roles.of_plan(plan), model.device.type == "meta"
    names = target_names(model, roles, knobs)
    targets = as_regex(names, [name for name, _ in model.named_modules()])
    config = lora_config(knobs, targets)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(knobs.seed)
        try:
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=hollow)
        except ValueError as error:
            fix = f"name other layers in lora_target_modules, such as {default_names(model, roles)[0]}"
            raise StageError(f"adapter: peft refuses: {first_line(error)}", fix) from None
        if hollow:
            materialise(peft_model, config)
    # peft would write the folder the base was loaded from, which is of no use to others and may say too much,
    # and for some families a set in place of the regex, which has another order in every process.
    config.base_model_name_or_path, config.revision = public_name(plan), plan["revision"]
    config.target_modules = targets
    hits = adapter_hits(peft_model, roles)
    if odd := set(names) ^ {name for found in hits.values() for name in found}:
        raise StageError(f"adapter: peft adapts other layers than asked, such as {sorted(odd)[0]}",
                         "name only attention layers in lora_target_modules")
    return peft_model, hits


def target_names(model, roles: Roles, knobs) -> list[str]:
    """Full names of the modules that LoRA adapts, by the recipe's regex, list of last names, or roles.

    A regex goes by full names, as in peft. It never hits a norm, a module that only holds others, or one that
    no forward reaches.
    """
    asked = knobs.lora_target_modules
    if asked is None:
        family = registry.family_of(model.config.model_type)
        names = lora_linears(model, roles, family, tuple(knobs.lora_target_roles))
        if not names:
            raise StageError(f"lora_target_roles: no linear layer in {', '.join(knobs.lora_target_roles)}",
                             f"choose among {', '.join(sorted(set(roles.paths.values())))}")
        if without := set(knobs.lora_target_roles) - {roles.of(name) for name in names}:
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


def default_names(model, roles: Roles) -> list[str]:
    """What LoRA adapts unless the recipe says otherwise."""
    return lora_linears(model, roles, registry.family_of(model.config.model_type), ("language",))


def as_regex(names: list[str], among: list[str]) -> str:
    """A regex for exactly these of a model's module names: a number becomes \\d+ where that hits no other."""
    short = "|".join(grouped(names, r"\d+"))
    exact = {name for name in among if re.fullmatch(short, name)} == set(names)
    return short if exact else "|".join(grouped(names))


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


def lora_config(knobs, targets: str):
    """peft's LoraConfig for a recipe."""
    from peft import LoraConfig
    return LoraConfig(r=knobs.lora_r, lora_alpha=knobs.lora_alpha, lora_dropout=knobs.lora_dropout,
                      target_modules=targets, use_dora=knobs.peft_use_dora, use_rslora=knobs.peft_use_rslora,
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
    """Role -> names of the base's modules that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    hits: dict[str, list[str]] = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, BaseTunerLayer):
            hits.setdefault(roles.of(base_name(name)), []).append(base_name(name))
    return hits


def base_name(name: str) -> str:
    """A module or parameter name as the base model has it, without PEFT's wrapping."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.default)?", "", name)

"""kernels: which attention each part of a model computes with: as asked, as its class can, as a machine has.

The plan holds what is asked, as far as the classes go, the same everywhere; `here` is what a machine makes of
it. Kernels differ in speed and rounding: so one that a class or a machine lacks is replaced by sdpa, with a
word. Where a kernel would compute something else for a family, its record refuses it.

Source: FlashAttention-2 (arXiv 2307.08691); FlexAttention (arXiv 2412.05496).
"""
from lib import terminal
from lib.families import Family
from lib.stage import StageError

FLAGS = {"flash_attention_2": "_supports_flash_attn", "flash_attention_3": "_supports_flash_attn",
         "flex_attention": "_supports_flex_attn"}                  # of transformers' classes
BLOCKS = "a picture's tokens see all of it, a mask that flash attention doesn't know"


def asked(family: Family, config, wanted: str) -> str | dict[str, str]:
    """The kernel for all parts, or {sub-config: kernel}, "" for the rest; a StageError by the record."""
    why = family.no_flash or (BLOCKS if family.block_masks else "")
    if wanted.startswith("flash") and why:
        raise StageError(f"attn_implementation: {wanted} can't be had for {family.name}: {why}",
                         "attn_implementation: sdpa")
    eager = [name for name in family.eager if getattr(config, name, None) is not None]
    if not eager:
        return wanted
    return {"": wanted, **dict.fromkeys(parts(config), wanted), **dict.fromkeys(eager, "eager")}


def parts(config) -> dict:
    """{name: sub-config} of the parts that a model has."""
    return {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}


def known_to(model, kernels: str | dict[str, str]) -> str | dict[str, str]:
    """The kernels, with sdpa where the class of a part knows no such one; the model may be on meta."""
    from transformers import PreTrainedModel
    named = {id(part): name for name, part in parts(model.config).items()} | {id(model.config): ""}
    found = kernels if isinstance(kernels, dict) else dict.fromkeys(named.values(), kernels)
    lacking = {}
    for module in model.modules():
        name = named.get(id(module.config)) if isinstance(module, PreTrainedModel) else None
        if name in found and found[name] in FLAGS and not getattr(module, FLAGS[found[name]]):
            lacking[name] = type(module).__name__
    if lacking:
        terminal.warn(f"{', '.join(sorted(set(lacking.values())))}: no {found['']}; sdpa gives the same")
    if {"", "text_config"} & lacking.keys():
        return replaced(kernels, lambda kernel: kernel not in FLAGS)
    return found | dict.fromkeys(lacking, "sdpa") if lacking else kernels


def replaced(kernels: str | dict[str, str], runs) -> str | dict[str, str]:
    """The kernels, with sdpa in the place of each for which `runs(kernel)` is false."""
    if isinstance(kernels, dict):
        return {part: replaced(kernel, runs) for part, kernel in kernels.items()}
    return kernels if runs(kernels) else "sdpa"


def here(kernels: str | dict[str, str], cuda: bool) -> str | dict[str, str]:
    """What a machine with or without CUDA computes with: flash and flex attention need it, flash its package.

    By machine and not by device: a model that is to be sharded is on the CPU first.
    """
    from transformers import utils
    there = {"flash_attention_2": utils.is_flash_attn_2_available,
             "flash_attention_3": utils.is_flash_attn_3_available,
             "flex_attention": utils.is_torch_flex_attn_available}   # whose backward no CPU has
    return replaced(kernels, lambda kernel: kernel not in there or cuda and there[kernel]())

"""kernels: the attention kernel of each part of a model: the one asked for, or sdpa where it can't be had.

The plan holds the kernels that the recipe asks for and the model's classes support, so it is the same on
every machine; `here` says what this machine makes of them. Kernels differ in speed and rounding only: so one
that a class or a machine lacks is replaced by sdpa, with a message. Where a kernel would compute something
else for a family, the family's record refuses it.

Source: FlashAttention-2 (arXiv 2307.08691); FlexAttention (arXiv 2412.05496).
"""
from lib.models.families import Family
from lib.run import terminal
from lib.run.errors import StageError

FLAGS = {"flash_attention_2": "_supports_flash_attn", "flash_attention_3": "_supports_flash_attn",
         "flex_attention": "_supports_flex_attn"}                  # attributes of transformers' classes
BLOCKS = "a picture's tokens see all of it, a mask that flash attention doesn't know"


def asked(family: Family, config, wanted: str) -> str | dict[str, str]:
    """The kernel for all parts, or {sub-config: kernel}, with "" for the rest.

    Raises StageError where the family's record refuses the kernel.
    """
    why = family.no_flash or (BLOCKS if family.block_masks else "")
    if wanted.startswith("flash") and why:
        raise StageError(f"attn_implementation: {wanted} can't be had for {family.name}: {why}",
                         "attn_implementation: sdpa")
    eager = [name for name in family.eager if getattr(config, name, None) is not None]
    if not eager:
        return wanted
    return {"": wanted, **dict.fromkeys(parts(config), wanted), **dict.fromkeys(eager, "eager")}


def parts(config) -> dict:
    """{name: sub-config} of those parts of a configuration that the model has."""
    return {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}


def known_to(model, kernels: str | dict[str, str]) -> str | dict[str, str]:
    """The kernels, with sdpa where a part's class doesn't support the one asked for.

    model: may be on the meta device.
    """
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
    """The kernels, with sdpa in place of each one for which `runs(kernel)` is false."""
    if isinstance(kernels, dict):
        return {part: replaced(kernel, runs) for part, kernel in kernels.items()}
    return kernels if runs(kernels) else "sdpa"


def here(kernels: str | dict[str, str], cuda: bool) -> str | dict[str, str]:
    """The kernels that this machine has; sdpa in place of the others.

    Flash and flex attention need CUDA, flash its package, too. cuda: whether the machine has it; a model that
    will be sharded is on the CPU first.
    """
    from transformers import utils
    there = {"flash_attention_2": utils.is_flash_attn_2_available,
             "flash_attention_3": utils.is_flash_attn_3_available,
             "flex_attention": utils.is_torch_flex_attn_available}   # whose backward no CPU has
    return replaced(kernels, lambda kernel: kernel not in there or cuda and there[kernel]())

"""quant: bitsandbytes for the language role's linear layers, and a count that proves it was only those.

Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3: nf4, double quantisation, bf16 compute.
"""
import torch

from lib.roles import Roles
from lib.stage import StageError


def kept_linears(model, roles: Roles) -> list[str]:
    """Full names of the linear layers that must stay unquantised: all outside the language role's layers.

    transformers matches these from the start of the name: "vision_tower" would skip nothing inside
    "model.vision_tower", so every name is written out. An explicit list also replaces the default one, which
    keeps the output head; it is among the names here.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(linears - set(quantised_linears(model, roles)))


def quantised_linears(model, roles: Roles) -> list[str]:
    """Full names of the linear layers that a 4-bit or 8-bit recipe quantises."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and roles.of(name) in ("language", "cross_attention")]


def plain_options(plan: dict) -> dict | None:
    """The arguments of transformers' BitsAndBytesConfig for a plan, as JSON can hold them, or None."""
    wanted = plan["quantisation"]
    if wanted is None:
        return None
    if wanted["bits"] == 8:
        return {"load_in_8bit": True, "llm_int8_skip_modules": wanted["kept_linears"], **wanted["options"]}
    return {"load_in_4bit": True, "llm_int8_skip_modules": wanted["kept_linears"],
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": plan["dtype"],
            **wanted["options"]}


def configuration(plan: dict):
    """transformers' BitsAndBytesConfig for a plan with quantisation."""
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(**plain_options(plan))


def check(model, plan: dict) -> int:
    """How many layers were quantised; a StageError when it isn't exactly those of the plan."""
    import bitsandbytes
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    wrong = found ^ set(plan["quantisation"]["linears"])
    if wrong:
        raise StageError(f"quantisation: {len(wrong)} layers are not as planned, such as {sorted(wrong)[0]}",
                         "run 03_load_model.py again; else the roles in lib/registry.py are wrong")
    keep_gradients(model)
    return len(found)


def keep_gradients(model) -> None:
    """Stop bitsandbytes from repacking weights on CPUs with AVX512_BF16 in the first evaluation forward.

    The repacked layout has no backward: the loss looks right, and every LoRA gradient is zero from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

"""plan: what a recipe's model is, found from its config and empty tensors, so the same on every machine.

A plan is 03's model.json. Scripts 03 to 06 load models by it alone (model.py), and compare with it.
"""
import contextlib
import json
import logging
import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from lib import quant, registry
from lib.config.paths import HUB_ID
from lib.models import kernels, origin, rope
from lib.models.roles import roles_of
from lib.models.trainable import refuse_other_losses, refuse_other_objectives
from lib.run import terminal
from lib.run.errors import StageError, first_line
from lib.run.ledger import read_json
from lib.text import vocabulary

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns, at import, of kernels not needed here


def make_plan(knobs) -> dict:
    """The plan of a recipe: class, revision, dtype, quantisation, roles with counts. No weights are read."""
    config = load_config(knobs.base_model, knobs.revision, knobs.trust_remote_code)
    refuse_broken_files(Path(knobs.base_model))
    family = registry.family_of(config.model_type)
    registry.refuse_missing_packages(family)
    if knobs.fp16 and family.float16:
        raise StageError(f"fp16: {family.name} can't train in float16: {family.float16}", "fp16: false")
    plan = {"base_model": knobs.base_model, "trust_remote_code": knobs.trust_remote_code,
            "revision": getattr(config, "_commit_hash", None) or knobs.revision,
            "model_type": config.model_type, "family": family.name,
            "class": registry.model_class(config, knobs.model_type).__name__,
            "dtype": "float16" if knobs.fp16 else "float32" if knobs.bf16 is False else "bfloat16",
            "attn_implementation": kernels.asked(family, config, knobs.attn_implementation),
            "text_config": rope.changes(config, knobs.overrides_of_model_config, knobs.sequence_len),
            "stored_as": quant.stored_as(config), "quantisation": None, "new_rows": []}
    model = with_an_attention_it_has(plan)
    plan["attn_implementation"] = kernels.known_to(model, plan["attn_implementation"])
    refuse_other_losses(model)
    plan["new_rows"] = vocabulary.new_rows(model, knobs)
    plan["grown_to"] = vocabulary.grow(model, plan["new_rows"])
    roles = roles_of(model, family)
    plan |= {"tied_head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
             "roles": roles.paths, "idle": roles.idle, "roles_guessed": roles.guessed,
             "parameters": dict(roles.count(model.named_parameters()))}         # a tied tensor once
    return plan | {"quantisation": quant.quantisation_of(plan, config, knobs, model, roles)}


def read_plan(work) -> dict:
    """The plan that a finished 03 wrote, as a later stage reads it."""
    return read_json(work.input("03_load_model") / "model.json")


def load_config(base_model: str, revision: str | None, trust_remote_code: bool):
    """The checkpoint's config; StageError where there is none that can be used."""
    from transformers import AutoConfig
    registry.refuse_unloadable(base_model)
    origin.silence()
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision,
                                            trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if refused := origin.refusal(base_model, revision, error):
            raise refused from None
        fix = ("mend its config.json, or name another model; an unknown type may need a newer transformers"
               if Path(base_model).exists() else "correct base_model or revision" if
               HUB_ID.fullmatch(base_model) else
               f"start it where 01_config.py was started: {Path.cwd()} has no such folder")
        raise StageError(f"base_model: {base_model}: no usable config ({first_line(error)})", fix) from None
    refuse_other_objectives(config)
    return config


def planned_config(plan: dict):
    """The checkpoint's config with what the recipe changes in it."""
    config = load_config(plan["base_model"], plan["revision"], plan["trust_remote_code"])
    return rope.set_in(config, plan["text_config"])


def refuse_broken_files(folder: Path) -> None:
    """Raise StageError where a folder's weight file is missing or cut short."""
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
    for path in sorted({*folder.glob("*.safetensors"), *(folder / name for name in named)}):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            reason = f"not whole: {first_line(error)}" if path.exists() else f"missing; {index.name} names it"
            raise StageError(f"base_model: {path} is {reason}", "download or copy that file again") from None


def on_meta(plan: dict):
    """The plan's model on the meta device, without memory: shapes and names are those of the loaded one."""
    config = planned_config(plan)
    cls = registry.model_class(config, plan["class"])
    with torch.device("meta"), quiet():
        model = cls._from_config(config, dtype=getattr(torch, plan["dtype"]),
                                 attn_implementation=kernels.here(plan["attn_implementation"], cuda=False))
        vocabulary.grow(model, plan["new_rows"])
    return model


def with_an_attention_it_has(plan: dict):
    """The plan's model on the meta device; eager attention, put into the plan, where it lacks the kernel."""
    try:
        return on_meta(plan)
    except ValueError as error:  # so transformers refuses a kernel
        if plan["attn_implementation"] == "eager":
            raise StageError(f"{plan['class']}: {first_line(error)}", "choose another base_model") from None
        terminal.warn(f"{plan['class']} has no sdpa attention; eager gives the same")
        plan["attn_implementation"] = "eager"
        return on_meta(plan)


def public_name(plan: dict) -> str:
    """The base model's name in exports: a hub id, or a folder's name without its path."""
    folder = Path(plan["base_model"])
    return folder.resolve().name if folder.exists() else plan["base_model"]


@contextlib.contextmanager
def quiet():
    """Inside, the libraries' progress bars, notices and warnings stay off the terminal; errors are shown."""
    from transformers.utils import logging as hf
    bars, level = hf.is_progress_bar_enabled(), hf.get_verbosity()
    hf.disable_progress_bar()
    hf.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            hf.set_verbosity(level)
            if bars:
                hf.enable_progress_bar()

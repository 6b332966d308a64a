"""saved: adapters as folders, in peft's own format: attached to a model, trained further, written.

Fork me to: train another kind of adapter further (`continued`).
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lib import quant
from lib.models.plan import quiet
from lib.models.roles import base_name
from lib.run import terminal
from lib.run.errors import StageError, first_line

WEIGHTS = "adapter_model.safetensors"
KNOBS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",     # knob: peft's name
         "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora"}
FOLLOWED = {*KNOBS.values(), "target_modules", "target_parameters", "trainable_token_indices"}
NO_MATTER = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
FROM_ZERO = (True, False, "gaussian", "orthogonal", "eva")         # the others also change the base's weights


def attach(model, folder: Path, trainable: bool = True):
    """The model with a saved PEFT adapter on it, in float32, which trains if asked.

    Raises StageError where tensors are missing, or peft doesn't read them, as where transformers renames a
    layer whose name has changed already; peft alone would warn and go on with random ones.
    """
    from peft import PeftModel
    with quiet():
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    quant.refuse_dora_on_cpu(peft_model)
    ours = tensors_of(peft_model)
    with safe_open(folder / WEIGHTS, "pt") as file:
        if odd := sorted(ours.keys() ^ set(file.keys())):
            raise StageError(f"{folder}: {len(odd)} tensors don't fit the model, such as {odd[0]}",
                             "run 04_lora.py again with --force")
        unread = [name for name in sorted(ours) if not same(ours[name], file.get_tensor(name))]
    if unread:
        raise StageError(f"{folder}: peft doesn't read {len(unread)} tensors of the adapter of a "
                         f"{type(model).__name__}, such as {unread[0]}",
                         "leave these layers out, by lora_target_modules")
    return peft_model


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether a tensor of the model has the values that one of a file has, NaN included."""
    return torch.allclose(ours.to(theirs), theirs, rtol=0, atol=0, equal_nan=True)


def tensors_of(peft_model) -> dict[str, torch.Tensor]:
    """{name: tensor} of an adapter, under the names of its file.

    Embeddings are left out, which peft would add where it can't look the base up on the hub.
    """
    from peft import get_peft_model_state_dict
    return get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def save_adapter(peft_model, folder: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} as written to adapter_model.safetensors, beside adapter_config.json, for plain peft."""
    with quiet():
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)      # peft's empty model card; 06 writes the real one
    return tensors_of(peft_model)


# ---- training further ----

def continued(knobs):
    """The knobs; if the recipe names an adapter to train further, its own in place of the LoRA knobs."""
    from peft import PeftConfig
    if knobs.lora_model_dir is None:
        return knobs
    name = f"lora_model_dir: {knobs.lora_model_dir}"
    try:
        with quiet(), safe_open(Path(knobs.lora_model_dir, WEIGHTS), "pt"):
            config = PeftConfig.from_pretrained(knobs.lora_model_dir)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StageError(f"{name} is damaged: {first_line(error)}", "copy it there again") from None
    if config.peft_type != "LORA":
        raise StageError(f"{name} is of the kind {config.peft_type}", "name a LoRA adapter")
    if odd := foreign_settings(config):
        raise StageError(f"{name} has {odd[0]}, which isn't trained here", "name an adapter without it")
    own = {knob: getattr(config, key) for knob, key in KNOBS.items()}
    others = [f"{knob} {value} (the recipe: {getattr(knobs, knob)})" for knob, value in own.items()
              if value != getattr(knobs, knob)]
    terminal.say(f"{name} is trained further, on its own targets" + "".join(f", {words}" for words in others))
    targets, parts = (sorted(found) if isinstance(found, set) else found or None
                      for found in (config.target_modules, config.target_parameters))
    own |= {"lora_target_modules": targets, "lora_target_parameters": parts}
    own |= {} if targets else {"lora_target_roles": ["experts"]}
    return type(knobs)(**vars(knobs) | own)


def foreign_settings(config) -> list[str]:
    """The settings of an adapter's configuration that aren't supported here and aren't the default."""
    rest = vars(config).keys() - FOLLOWED - NO_MATTER - {"init_lora_weights"}
    odd = [key for key in vars(type(config)()) if key in rest and getattr(config, key) not in (
        None, False, "none", {}, [])]
    start = config.init_lora_weights
    return odd + ([] if start in FROM_ZERO else [f"init_lora_weights: {start}"])


def refuse_foreign(model, folder: Path) -> None:
    """Raise StageError for an adapter with a tensor for a layer that the model doesn't have."""
    there = {name for name, _ in model.named_modules()}
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in sorted(file.keys()):
            if base_name(name).removesuffix(".weight") not in there:
                raise foreign(folder, f"{type(model).__name__} has no layer for {name}",
                              "; other versions of transformers may have named its layers otherwise")


def fill(peft_model, folder: Path) -> None:
    """Copy a saved adapter's values into the model's; raise StageError where a tensor's shape differs."""
    ours, theirs = tensors_of(peft_model), load_file(folder / WEIGHTS)
    for name in sorted(ours.keys() | theirs.keys()):
        found, wanted = (list(side[name].shape) if name in side else "none" for side in (theirs, ours))
        if found != wanted:
            raise foreign(folder, f"{name} is {found}, base_model takes {wanted}")
        ours[name].copy_(theirs[name])


def foreign(folder: Path, words: str, hint: str = "") -> StageError:
    """The StageError for an adapter that doesn't fit the model."""
    return StageError(f"lora_model_dir: {folder} is an adapter of another model: {words}",
                      f"name the base_model that it was trained on, and its tokens if it has any{hint}")

"""registry: the record of a model type, what follows from it, and the class that loads it.

The records themselves are in lib/models/families.py.
"""
import importlib.util

from lib.models.families import FAMILIES, Family
from lib.run import versions
from lib.run.errors import StageError


def family_of(model_type: str) -> Family:
    """The record for a config's model_type, or a generic one whose roles are guessed."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return Family(f"generic ({model_type})", (model_type,))


def template_names() -> list[str]:
    """The names that Axolotl's recipes give to chat templates, those of all families."""
    return sorted({name for family in FAMILIES for name in family.template_names})


def refuse_foreign_template(name: str, family: Family) -> None:
    """Raise StageError where a chat template's name belongs to another family."""
    if name not in family.template_names:
        owners = " and ".join(each.name for each in FAMILIES if name in each.template_names)
        raise StageError(f"chat_template: {name} is the template of {owners}; base_model is {family.name}",
                         "remove chat_template (the checkpoint's own serves), or name a .jinja file")


def refuse_unloadable(base_model: str) -> None:
    """Raise StageError, before any download, for a published id in a format that can't be trained here."""
    for family in FAMILIES:
        for published, converted in family.use_instead.items():
            if base_model.lower() == published.lower():              # the hub takes either spelling
                raise StageError(f"base_model: {base_model} is published in a format that isn't trained here",
                                 f"use the converted checkpoint: base_model: {converted}")


def refuse_missing_packages(family: Family) -> None:
    """Raise StageError, with the pip command, for a package that a family needs and isn't here."""
    if family.transformers:
        versions.refuse_older("transformers", family.transformers, family.name)
    missing = [pip for module, pip in family.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise StageError(f"{family.name} needs {', '.join(missing)}, not installed here",
                         f"pip install {' '.join(repr(pip) if '[' in pip else pip for pip in missing)}")


def refuse_cuda_packages(family: Family, device_type: str) -> None:
    """Raise StageError, with the pip command, for an installed package whose kernels need another device."""
    found = [pip for module, pip in family.absent.items() if importlib.util.find_spec(module) is not None]
    if found and device_type != "cuda":
        raise StageError(f"{family.name} would take the kernels of {', '.join(found)}, which need CUDA; "
                         f"this device is {device_type}", f"pip uninstall {' '.join(found)}")


def kinds_without_tower(config) -> tuple[str, ...]:
    """The kinds of media for which a configuration has no tower, as audio in some sizes of Gemma-4."""
    parts = {"image": "vision_config", "video": "vision_config", "audio": "audio_config"}
    return tuple(kind for kind, part in parts.items() if getattr(config, part, config) is None)


# ------------------------------------------------------------------------------------------------ the class

def auto_class(model_type: str) -> str:
    """The name of the auto class for a model type: transformers' multimodal table first, else the causal one.

    AutoModelForCausalLM also answers for some multimodal types and silently drops their towers, so it is only
    asked for the types that the multimodal table lacks ("llava" and "qwen2_vl" are in it, "llama" is not).
    """
    from transformers.models.auto import modeling_auto
    # Before transformers 5.20 the widest table (which adds audio models) doesn't exist.
    for name, table in (("AutoModelForMultimodalLM", "MULTIMODAL_LM"),
                        ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
                        ("AutoModelForCausalLM", "CAUSAL_LM")):
        if model_type in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}):
            return name
    raise StageError(f"base_model: transformers has no generative model for type {model_type!r}",
                     "choose an image-text-to-text, audio-text-to-text or causal language model")


def model_class(config, override: str | None = None) -> type:
    """The transformers class for a config, by `auto_class` or the recipe's `model_type`."""
    import transformers
    name = override or auto_class(config.model_type)
    found = getattr(transformers, name, None)
    if found is None:
        raise StageError(f"model_type: transformers {transformers.__version__} has no class {name!r}",
                         "leave model_type out (it is found by itself), or name a transformers class")
    if not name.startswith("AutoModel"):
        return found
    if type(config) not in found._model_mapping:
        raise StageError(f"model_type: {name} has no model for a {config.model_type!r} checkpoint",
                         "leave model_type out: it is found by itself")
    concrete = found._model_mapping[type(config)]
    return concrete[0] if isinstance(concrete, (list, tuple)) else concrete

"""registry: what the kit knows about a model family, in one record per family and nowhere else.

A record holds facts and names of strategies, never code: each strategy (`collate="stack"`) is written once,
where it is used. A model type without a record gets a generic one, whose roles are guessed (lib/roles.py).

Fork me to: add a family (one `Family(...)` below and one builder in tests/zoo.py).
"""
import importlib.util
from dataclasses import dataclass, field

from lib.stage import StageError


@dataclass(frozen=True)
class Family:
    """One family's facts. Module paths are those of the loaded model, as `named_modules()` prints them.

    roles: module path -> role, for everything below it; the longest path wins. Empty means: guess.
    wrappers: special tokens that the chat template, not the processor, puts around media; never trained.
    collate: "cat" joins media tensors along their first axis, "stack" pads them and keeps one entry per row.
    batch: "alike" lets only rows with equally many pictures share a micro-batch.
    idle: which parameters no forward reaches, by the name of a rule in `idle_modules`; they can't be trained.
    no_lora: path components that LoRA leaves alone although they hold linear layers of the language model.
    eager: sub-configs whose part of the model has no sdpa attention.
    packing: why samples can't share a row; empty where they can, which 05 shows on the loaded model.
    block_masks: kinds of layers in which a picture's tokens see all of it; packed rows then need own masks.
    template: a file in lib/templates that serves where the published checkpoint has no chat template.
    special_tokens: {name: token} of the tokenizer, where the published one has none.
    packages: what its model or processor imports beyond requirements.txt, as {module: pip name}.
    use_instead: published ids that are no transformers checkpoint -> those that are.
    """
    name: str
    model_types: tuple[str, ...]
    roles: dict[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    collate: str = "cat"
    batch: str = "any"
    idle: str = ""
    no_lora: tuple[str, ...] = ()
    eager: tuple[str, ...] = ()
    packing: str = ""
    block_masks: tuple[str, ...] = ()
    template: str = ""
    special_tokens: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    use_instead: dict[str, str] = field(default_factory=dict)
    note: str = ""


TOWER = {"model.vision_tower": "vision", "model.multi_modal_projector": "projector",
         "model.language_model": "language"}
VISUAL = {"model.visual": "vision", "model.visual.merger": "projector", "model.language_model": "language"}
QWEN_WRAPPERS = ("<|vision_start|>", "<|vision_end|>")
STATE = "its layers hand a state from token to token, over the border between samples"
GLM_WRAPPERS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")

FAMILIES = (
    Family("LLaVA-1.5 and Pixtral", ("llava",), TOWER, idle="after_feature_layer",
           use_instead={"mistralai/Pixtral-12B-2409": "mistral-community/pixtral-12b",
                        "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
                        "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf"},
           note="Pixtral is this model type around a Mistral and its own tower"),
    Family("Mistral-Small 3.1 and 4, Magistral", ("mistral3",), TOWER, template="mistral.jinja",
           special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
           note="Mistral-Small-4 is this type around mistral4 (MLA, experts); Magistral ships no template"),
    Family("Mllama", ("mllama",),
           {"model.vision_model": "vision", "model.multi_modal_projector": "projector",
            "model.language_model": "language"},
           collate="stack", batch="alike",
           packing="tokens before a picture attend to all pictures of the row",
           note="pictures enter by cross-attention; only rows with equally many share a batch"),
    Family("Llama-4", ("llama4",),
           {"vision_model": "vision", "vision_model.vision_adapter": "projector",
            "multi_modal_projector": "projector", "language_model": "language"},
           note="experts train only by lora_target_parameters"),
    Family("Gemma-3", ("gemma3",), TOWER, block_masks=("full_attention", "sliding_attention"),
           note="picture tokens attend in both directions, by token_type_ids"),
    Family("Gemma-3n", ("gemma3n",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           no_lora=("altup",), packages={"timm": "timm"}),
    Family("Gemma-4", ("gemma4",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           block_masks=("sliding_attention",), eager=("audio_config",)),
    Family("Qwen2-VL", ("qwen2_vl",), VISUAL, QWEN_WRAPPERS),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), VISUAL, QWEN_WRAPPERS,
           note="native resolution; 3-D rope from mm_token_type_ids and image_grid_thw"),
    Family("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"),
           VISUAL | {"model.visual.deepstack_merger_list": "projector"}, QWEN_WRAPPERS),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), VISUAL, QWEN_WRAPPERS, packing=STATE,
           note="linear attention; earlier turns lose their thoughts, so each reply is a sample of its own"),
    Family("GLM-4.1V and 4.6V", ("glm4v", "glm46v"), VISUAL, GLM_WRAPPERS),
    Family("GLM-4.5V and 4.6V, experts", ("glm4v_moe",), VISUAL, GLM_WRAPPERS,
           no_lora=("gate_proj", "up_proj", "down_proj"),
           note="LoRA on attention only: peft moves adapters on gate, up and down to the experts by itself"),
    Family("SmolVLM2", ("smolvlm",),
           {"model.vision_model": "vision", "model.connector": "projector", "model.text_model": "language"},
           collate="stack", packages={"num2words": "num2words"},
           note="tiles with row and column tokens; padding tiles are all zero"),
    Family("LFM2-VL", ("lfm2_vl",), TOWER, packing=STATE),
    Family("InternVL", ("internvl",), TOWER,
           use_instead={f"OpenGVLab/InternVL3_5-{size}": f"OpenGVLab/InternVL3_5-{size}-HF"
                        for size in ("1B", "2B", "4B", "8B", "14B", "38B")}),
    Family("PaddleOCR-VL", ("paddleocr_vl",),
           {"model.visual": "vision", "model.projector": "projector", "model.language_model": "language"},
           wrappers=("<|IMAGE_START|>", "<|IMAGE_END|>")),
    Family("Voxtral", ("voxtral",),
           {"model.audio_tower": "audio", "model.multi_modal_projector": "projector",
            "model.language_model": "language"},
           packages={"mistral_common": "mistral-common[audio]", "soundfile": "soundfile"}),
)


def family_of(model_type: str) -> Family:
    """The record for a config's model_type, or a generic one whose roles are guessed."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return Family(f"generic ({model_type})", (model_type,))


def refuse_unloadable(base_model: str) -> None:
    """A StageError before any download, where a published id is known to be no transformers checkpoint."""
    for family in FAMILIES:
        if base_model in family.use_instead:
            raise StageError(f"base_model: {base_model} is in a format that transformers doesn't load",
                             f"use the converted checkpoint: base_model: {family.use_instead[base_model]}")


def require_packages(family: Family) -> None:
    """A StageError with the pip line, where a family needs a package that is not installed."""
    missing = [pip for module, pip in family.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise StageError(f"{family.name} needs {', '.join(missing)}, not installed here",
                         f"pip install {' '.join(repr(pip) if '[' in pip else pip for pip in missing)}")


def attention(family: Family, config, wanted: str) -> str | dict[str, str]:
    """The attention kernel for a model's parts: the wanted one, or eager for sub-configs without it."""
    eager = [name for name in family.eager if getattr(config, name, None) is not None]
    if not eager:
        return wanted
    parts = {name: wanted for name in ("text_config", "vision_config") if hasattr(config, name)}
    return {"": wanted, **parts, **{name: "eager" for name in eager}}


# ------------------------------------------------------------------------------------------------ the class

def auto_class(model_type: str) -> str:
    """The name of the auto class for a model type: transformers' multimodal table first, else the causal one.

    AutoModelForCausalLM also answers for some multimodal types and silently drops their towers, so it is only
    asked for the types that the multimodal table lacks ("llava" and "qwen2_vl" are in it, "llama" is not).
    """
    from transformers.models.auto import modeling_auto as auto
    # Before transformers 5.20 the wider table (which adds audio models) doesn't exist.
    wide = getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    if model_type in wide:
        return "AutoModelForMultimodalLM"
    if model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "AutoModelForImageTextToText"
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "AutoModelForCausalLM"
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

"""registry: what the kit knows about a model family, in one record per family and nowhere else.

A record holds facts and names of strategies, never code: each strategy (`collate="stack"`) is written once, where it is
used. A model type without a record gets a generic one, whose roles are guessed from the module tree; 03 prints the guess.

Fork me to: add a family (one `Family(...)` below and one builder in tests/zoo.py).
"""
import importlib.util
import re
from dataclasses import dataclass, field

from lib.stage import StageError

ROLES = ("language", "vision", "audio", "projector", "cross_attention", "head", "embedding", "experts", "router")


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
    template: str = ""
    special_tokens: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    use_instead: dict[str, str] = field(default_factory=dict)
    note: str = ""


TOWER = {"model.vision_tower": "vision", "model.multi_modal_projector": "projector", "model.language_model": "language"}
VISUAL = {"model.visual": "vision", "model.visual.merger": "projector", "model.language_model": "language"}
QWEN_WRAPPERS = ("<|vision_start|>", "<|vision_end|>")
GLM_WRAPPERS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")

FAMILIES = (
    Family("LLaVA-1.5 and Pixtral", ("llava",), TOWER, idle="after_feature_layer",
           use_instead={"mistralai/Pixtral-12B-2409": "mistral-community/pixtral-12b",
                        "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
                        "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf"},
           note="Pixtral is this model type around a Mistral and its own tower"),
    Family("Mistral-Small 3.1 and 4, Magistral", ("mistral3",), TOWER, template="mistral.jinja",
           special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
           note="Mistral-Small-4 is this model type around mistral4 (MLA and experts); Magistral ships no template"),
    Family("Mllama", ("mllama",),
           {"model.vision_model": "vision", "model.multi_modal_projector": "projector",
            "model.language_model": "language"},
           collate="stack", batch="alike",
           note="pictures enter by cross-attention, one token each; rows with other picture counts change its logits"),
    Family("Llama-4", ("llama4",),
           {"vision_model": "vision", "vision_model.vision_adapter": "projector", "multi_modal_projector": "projector",
            "language_model": "language"},
           note="experts train only by lora_target_parameters"),
    Family("Gemma-3", ("gemma3",), TOWER, note="picture tokens attend in both directions, by token_type_ids"),
    Family("Gemma-3n", ("gemma3n",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           no_lora=("altup",), packages={"timm": "timm"}),
    Family("Gemma-4", ("gemma4",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           eager=("audio_config",)),
    Family("Qwen2-VL", ("qwen2_vl",), VISUAL, QWEN_WRAPPERS),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), VISUAL, QWEN_WRAPPERS,
           note="native resolution; 3-D rope from mm_token_type_ids and image_grid_thw"),
    Family("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), VISUAL | {"model.visual.deepstack_merger_list": "projector"},
           QWEN_WRAPPERS),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), VISUAL, QWEN_WRAPPERS,
           note="linear attention in three of four layers; earlier turns lose their thoughts, so each reply is a sample"),
    Family("GLM-4.1V and 4.6V", ("glm4v", "glm46v"), VISUAL, GLM_WRAPPERS),
    Family("GLM-4.5V and 4.6V, experts", ("glm4v_moe",), VISUAL, GLM_WRAPPERS, no_lora=("gate_proj", "up_proj", "down_proj"),
           note="LoRA on attention only: peft moves adapters on gate, up and down to the experts by itself"),
    Family("SmolVLM2", ("smolvlm",),
           {"model.vision_model": "vision", "model.connector": "projector", "model.text_model": "language"},
           collate="stack", packages={"num2words": "num2words"},
           note="tiles with row and column tokens; padding tiles are all zero"),
    Family("LFM2-VL", ("lfm2_vl",), TOWER),
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
            raise StageError(f"base_model: {base_model} is published in a format that transformers doesn't load",
                             f"use the converted checkpoint: base_model: {family.use_instead[base_model]}")


def require_packages(family: Family) -> None:
    """A StageError with the pip line, where a family needs a package that is not installed."""
    missing = [pip for module, pip in family.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise StageError(f"{family.name} needs {', '.join(missing)}, not installed here",
                         f"pip install {' '.join(repr(pip) if '[' in pip else pip for pip in missing)}")


def attention(family: Family, config, wanted: str) -> str | dict[str, str]:
    """The attention kernel for a model's parts: the wanted one, and eager for the sub-configs that know no other."""
    eager = [name for name in family.eager if getattr(config, name, None) is not None]
    if not eager:
        return wanted
    parts = {name: wanted for name in ("text_config", "vision_config") if getattr(config, name, None) is not None}
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
    """The transformers class for a config, by `auto_class` or by the recipe's `model_type` (auto or concrete)."""
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


# ------------------------------------------------------------------------------------------------ the roles

# Inside the language model, these path components have a role of their own in every family.
INNER = {"experts": "experts", "router": "router", "gate": "router", "shared_expert_gate": "router",
         "modality_router": "router",
         "cross_attn": "cross_attention", "encoder_attn": "cross_attention"}

# For families without a record: the words by which module trees name their parts.
GUESSES = (("projector", r"projector|projection|connector|merger|aligner|adapter|resampler|abstractor|perceiver"
                         r"|embed_vision|embed_audio|embed_image|modality_proj|vision_proj|image_proj|visual_proj"),
           ("audio", r"audio|speech|whisper"),
           ("vision", r"vision|visual|image|vit\b|video"))


@dataclass(frozen=True)
class Roles:
    """Which role each module of a model plays: `paths` maps module paths to roles, the longest path wins."""
    paths: dict[str, str]
    idle: list[str] = field(default_factory=list)
    guessed: bool = False

    @classmethod
    def of_plan(cls, plan: dict) -> "Roles":
        """The roles that model.json holds."""
        return cls(plan["roles"], plan["idle"], plan["roles_guessed"])

    def is_idle(self, name: str) -> bool:
        """Whether no forward reaches this module or parameter."""
        return any(name == path or name.startswith(path + ".") for path in self.idle)

    def of(self, name: str) -> str | None:
        """The role of a module or parameter name, or None where no path covers it."""
        parts = name.split(".")
        for length in range(len(parts), -1, -1):
            role = self.paths.get(".".join(parts[:length]))
            if role is not None:
                break
        else:
            return None
        if role == "language":
            return next((INNER[part] for part in parts[length:] if part in INNER), role)
        return role


def roles_of(model, family: Family) -> Roles:
    """The roles of a model's modules: the record's paths, or a guess, plus its own input embedding and head."""
    paths = dict(family.roles) or guess_roles(model)
    names = {module: name for name, module in model.named_modules()}
    if model.get_output_embeddings() is not None:
        paths[names[model.get_output_embeddings()]] = "head"
    paths[names[model.get_input_embeddings()]] = "embedding"
    roles = Roles(paths, idle_modules(model, family), guessed=not family.roles)
    homeless = sorted({name for name, _ in model.named_parameters() if roles.of(name) is None})
    if homeless:
        raise StageError(f"{type(model).__name__}: no role for {len(homeless)} parameters, such as {homeless[0]}",
                         f"add a record for {family.model_types[0]!r} to FAMILIES in lib/registry.py")
    return roles


def idle_modules(model, family: Family) -> list[str]:
    """Paths of the modules that no forward of this family reaches, so that nothing waits for their gradient."""
    if family.idle != "after_feature_layer":
        return []
    # The projector reads the hidden states of an inner layer (-2 in LLaVA-1.5): what comes after it is dead weight.
    layer = model.config.vision_feature_layer
    names = [name for name, _ in model.named_modules() if name.startswith("model.vision_tower.")]
    numbers = {int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)$", name))}
    if not isinstance(layer, int) or not numbers:
        return []
    last_used = layer - 1 if layer >= 0 else max(numbers) + 1 + layer
    return [name for name in names if name.endswith(".post_layernorm")
            or (found := re.search(r"\.layers\.(\d+)$", name)) and int(found[1]) > last_used]


def guess_roles(model) -> dict[str, str]:
    """Module path -> role for a family without a record: the decoder is language, words name the other parts.

    A text-only model is language as a whole. In a multimodal one only what is recognised gets a role, so that a
    tower is never silently taken for language: `roles_of` refuses what is left over.
    """
    names = {module: name for name, module in model.named_modules()}
    decoder = names.get(model.get_decoder(), model.base_model_prefix)
    base = model.base_model_prefix
    if decoder in ("", base):
        return {base: "language"}
    paths = {decoder: "language"}
    for name, module in model.named_modules():
        if not name or name.startswith(decoder + ".") or name == decoder or decoder.startswith(name + "."):
            continue
        leaf = name.rsplit(".", 1)[-1]
        role = next((role for role, words in GUESSES if re.search(words, leaf)), None)
        above = next((paths[p] for p in parents(name) if p in paths), None)
        if role and (above is None or (role == "projector" and above != "projector" and name.count(".") <= 2)):
            paths[name] = role
    return paths


def parents(name: str) -> list[str]:
    """The paths above a module, nearest first: a.b.c -> [a.b, a]."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def lora_linears(model, roles: Roles, family: Family, wanted: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that LoRA adapts when the recipe asks for these roles.

    Language means every linear layer inside its decoder layers, cross-attention and shared experts included; what
    routes (router, gates) is left out unless asked for. Other roles: every linear layer they hold.
    """
    import torch
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or roles.is_idle(name):
            continue
        role = roles.of(name)
        if set(family.no_lora) & set(name.split(".")):
            continue
        if role in wanted and role != "language":
            names.append(name)
        elif "language" in wanted and role in ("language", "cross_attention") and re.search(r"\.\d+\.", name):
            names.append(name)
    return names

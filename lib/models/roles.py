"""roles: which part each module of a model plays (language, vision, projector …), and what follows from it.

Freezing, LoRA, quantisation, checkpointing and the tables speak in roles; only a family's record knows
module names. A family without a record gets its roles guessed from the module tree, and 03 says so.

Fork me to: adapt other layers by default (`lora_linears`).
"""
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lib.registry import Family
from lib.run.errors import StageError

# Inside the language model, these path components have a role of their own in every family.
INNER = {"experts": "experts", "router": "router", "gate": "router", "shared_expert_gate": "router",
         "modality_router": "router", "indexer": "router",
         "cross_attn": "cross_attention", "encoder_attn": "cross_attention"}

# For families without a record: the words by which module trees name their parts.
GUESSES = (("projector", r"projector|projection|connector|merger|aligner|adapter|resampler|abstractor"
                         r"|perceiver|embed_(vision|audio|image)|(modality|vision|image|visual)_proj"),
           ("audio", r"audio|speech|whisper"),
           ("vision", r"vision|visual|image|vit\b|video|vqmodel|generation"))
# Single learned tensors beside the parts, such as the one between the rows of a picture's features.
LOOSE = r"newline|sepe?a?rator|vision|visual|image"


@dataclass(frozen=True)
class Roles:
    """Which role each module of a model plays.

    paths: {module path: role}; the longest path wins. idle: paths that no forward reaches. guessed: whether
    the family has no record.
    """
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
        """The role of a module or parameter, by its name; None where no path covers it.

        The name may have PEFT's wrapping.
        """
        parts = base_name(name).split(".")
        for length in range(len(parts), -1, -1):
            role = self.paths.get(".".join(parts[:length]))
            if role == "language":
                return next((INNER[part] for part in parts[length:] if part in INNER), role)
            if role:
                return role
        return None

    def count(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> Counter:
        """{role: number of elements} of (name, parameter) pairs."""
        counts = Counter()
        for name, parameter in parameters:
            counts[self.of(name)] += parameter.numel()
        return counts

    def layers(self, model) -> list[tuple[str, torch.nn.Module]]:
        """(role, layer) of each layer of a model that transformers can run again in the backward."""
        from transformers.modeling_layers import GradientCheckpointingLayer
        return [(self.of(name), module) for name, module in model.named_modules()
                if isinstance(module, GradientCheckpointingLayer)]


def roles_of(model, family: Family) -> Roles:
    """The roles of a model's modules: the record's paths, or a guess, plus its own embedding and head."""
    paths = dict(family.roles) or guess_roles(model)
    names = {module: name for name, module in model.named_modules()}
    if model.get_output_embeddings() is not None:
        paths[names[model.get_output_embeddings()]] = "head"
    paths[names[model.get_input_embeddings()]] = "embedding"
    roles = Roles(paths, idle_modules(model, family), guessed=not family.roles)
    homeless = sorted({name for name, _ in model.named_parameters() if roles.of(name) is None})
    if homeless:
        raise StageError(f"{type(model).__name__}: {len(homeless)} parameters have no role: {homeless[0]}, …",
                         f"add a record for {family.model_types[0]!r} to lib/models/families.py")
    return roles


def idle_modules(model, family: Family) -> list[str]:
    """Paths of the modules that no forward of this family reaches, which therefore get no gradient."""
    if family.idle != "after_feature_layer":
        return []
    # The projector reads an inner layer's hidden states (-2 in LLaVA-1.5): what comes after is dead weight.
    layer = model.config.vision_feature_layer
    names = [name for name, _ in model.named_modules() if name.startswith("model.vision_tower.")]
    numbers = {int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)$", name))}
    if not isinstance(layer, int) or not numbers:
        return []
    last_used = layer - 1 if layer >= 0 else max(numbers) + 1 + layer
    return [name for name in names if name.endswith(".post_layernorm")
            or (found := re.search(r"\.layers\.(\d+)$", name)) and int(found[1]) > last_used]


def guess_roles(model) -> dict[str, str]:
    """{module path: role} for a family without a record: the decoder is language, names tell the other parts.

    A text-only model is language as a whole. In a multimodal one only what is recognised gets a role, so that
    a tower is never silently taken for language: `roles_of` refuses what is left over.
    """
    names = {module: name for name, module in model.named_modules()}
    decoder = names.get(model.get_decoder(), model.base_model_prefix)
    base = model.base_model_prefix
    if decoder in ("", base):
        if model.config.sub_configs:                    # of a tower, which is somewhere inside
            raise StageError(f"{type(model).__name__}: its towers can't be told from its language model",
                             f"add a record for {model.config.model_type!r} to lib/models/families.py")
        return {base: "language"}
    paths = {decoder: "language"}
    for name, module in model.named_modules():
        if not name or name.startswith(decoder + ".") or name == decoder or decoder.startswith(name + "."):
            continue
        leaf = name.rsplit(".", 1)[-1]
        role = next((role for role, words in GUESSES if re.search(words, leaf)), None)
        above = next((paths[p] for p in parents(name) if p in paths), None)
        inner = role == "projector" and above != "projector" and name.count(".") <= 2
        if role and (above is None or inner):
            paths[name] = role
    for name, _ in model.named_parameters():
        covered = any(path in paths for path in (name, *parents(name)))
        if not covered and re.search(LOOSE, name.rsplit(".", 1)[-1]):
            paths[name] = "projector"
    return paths


def base_name(name: str) -> str:
    """A module or parameter name as the base model has it, without PEFT's wrapping."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_\w+|base_layer|token_adapter|trainable_tokens_delta)(\.default)?", "", name)


def parents(name: str) -> list[str]:
    """The paths above a module, nearest first: a.b.c -> [a.b, a]."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def lora_linears(model, roles: Roles, family: Family, wanted: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that LoRA adapts when the recipe asks for these roles.

    Language means every linear layer inside its decoder layers, cross-attention and shared experts included;
    what routes (router, gates) is left out unless asked for. Other roles: every linear layer they hold.
    """
    def is_wanted(name: str):
        role = roles.of(name)
        if role in wanted and role != "language":
            return True
        in_decoder = role in ("language", "cross_attention") and re.search(r"\.\d+\.", name)
        return "language" in wanted and in_decoder
    left_alone = set(family.no_lora)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
            and not roles.is_idle(name) and not left_alone & set(name.split(".")) and is_wanted(name)]

"""vocabulary: the tokens that a recipe adds, in the tokenizer and as rows of embedding and head.

A token that the tokenizer lacks gets the next id, and embedding and head grow where they have no row for it.
With an adapter, these new rows train, no other, and are saved with it: peft's `trainable_token_indices`.

Fork me to: initialise new rows in another way (`grow`).
"""
import torch

from lib import registry
from lib.run.errors import StageError
from lib.text.processor import load_processor, tokenizer_of
from lib.text.tekken import TekkenProcessor


def add_tokens(processor, knobs) -> list[int]:
    """The ids of the recipe's tokens that were new to the processor's tokenizer, to which they are added."""
    special = dict(knobs.special_tokens)
    if not special and not knobs.tokens:
        return []
    if isinstance(processor, TekkenProcessor):
        raise StageError(f"{named(knobs)}: Mistral's own tokenizer takes none", f"remove {named(knobs)}")
    tokenizer = tokenizer_of(processor)
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    tokenizer.add_tokens(knobs.tokens)
    given = {*knobs.tokens, *special.pop("additional_special_tokens", []), *special.values()}
    return sorted(tokenizer.convert_tokens_to_ids(token) for token in given - known.keys())


def new_rows(model, knobs) -> list[int]:
    """The rows of embedding and head that train for a recipe's new tokens: theirs, and all that are added."""
    if not knobs.special_tokens and not knobs.tokens:
        return []
    options = {"revision": knobs.revision, "trust_remote_code": knobs.trust_remote_code}
    ids = add_tokens(load_processor(knobs.base_model, **options), knobs)
    family, rows = registry.family_of(model.config.model_type), len(model.get_input_embeddings().weight)
    if ids and (reason := family.new_tokens or obstacle(model, rows)):
        raise StageError(f"{named(knobs)}: {family.name} takes no new token: {reason}",
                         "use words that the tokenizer has")
    return sorted({*ids, *range(rows, max(ids, default=0) + 1)})


def obstacle(model, rows: int) -> str:
    """Why a model can't learn new tokens by new rows of its embedding and its head; "" where it can."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        return "its head has a bias"
    if len(head.weight) != rows:
        return "its head has fewer rows than its embedding"
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return "its layers have embeddings of their own" if sum(len(t.weight) == rows for t in tables) > 1 else ""


def named(knobs) -> str:
    """The name of the knob that adds tokens, for messages."""
    return "tokens" if knobs.tokens else "special_tokens"


@torch.no_grad()
def grow(model, rows: list[int]) -> int | None:
    """The number of rows to which embedding and head were grown, to have all of these; None if they had them.

    New rows begin as the mean of the others.
    """
    before = len(model.get_input_embeddings().weight)
    if not rows or rows[-1] < before:
        return None
    model.resize_token_embeddings(rows[-1] + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[before:] = layer.weight[:before].mean(0, dtype=torch.float32)
    return rows[-1] + 1


def trained(model, plan: dict) -> dict[str, list[int]] | None:
    """{module: rows that train} for peft, or None; a head that is tied to the embedding follows by itself."""
    if not plan["new_rows"]:
        return None
    parts = [model.get_input_embeddings(), *([] if plan["tied_head"] else [model.get_output_embeddings()])]
    return {name: plan["new_rows"] for name, module in model.named_modules() if module in parts}

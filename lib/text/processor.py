"""processor: a checkpoint's processor (tokenizer, chat template, preparation of media), and facts about it.

A text-only checkpoint has no processor: there, the tokenizer is meant.
"""
import contextlib
import re
from pathlib import Path

from lib import registry
from lib.run import terminal
from lib.run.errors import StageError, first_line
from lib.text.tekken import TekkenProcessor

KINDS = {"image": ("image_processor",), "video": ("video_processor",),       # kind: the part that prepares it
         "audio": ("feature_extractor", "audio_processor")}
LOADING = (OSError, ValueError, KeyError, TypeError, ImportError)   # what a broken or missing file raises


def load_processor(path, kind: str | None = None, **options):
    """The processor of a checkpoint, or its tokenizer if it is text-only, set to pad on the right.

    kind: a processor class, in place of the one that the checkpoint names.
    """
    import transformers
    cls = getattr(transformers, kind or "AutoProcessor", None)
    if cls is None:
        raise StageError(f"processor_type: transformers {transformers.__version__} has no class {kind!r}",
                         "leave processor_type out: it is found by itself")
    try:
        processor = cls.from_pretrained(path, **options)
    except LOADING as error:
        raise StageError(f"base_model: {path}: no processor could be loaded: {first_line(error)}",
                         "name a folder or hub id with whole tokenizer and processor files") from None
    if hasattr(processor, "tokenizer") and type(processor.tokenizer).__name__ == "MistralCommonBackend":
        template = Path(path, "chat_template.jinja")                         # which it doesn't read itself
        text = template.read_text(encoding="utf-8") if template.is_file() else None
        processor = TekkenProcessor(processor, text)
    tokenizer = tokenizer_of(processor)
    if not getattr(tokenizer, "is_fast", False):
        raise StageError(f"base_model: {path}: its {type(tokenizer).__name__} can't place its tokens",
                         "name a checkpoint with a tokenizer.json")
    if not set(tokenizer("a b", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
        raise StageError(f"base_model: {path}: its {type(tokenizer).__name__} has no vocabulary",
                         "name a checkpoint with a whole tokenizer.json")
    tokenizer.padding_side = "right"
    if not processor.chat_template:       # many checkpoints keep it with the tokenizer alone
        processor.chat_template = tokenizer.chat_template
    return processor


def complete(processor, family: registry.Family):
    """The processor, with the family's chat template and special tokens where the checkpoint has none."""
    tokenizer = tokenizer_of(processor)
    for name, token in family.special_tokens.items():
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)
    if not processor.chat_template and family.template:
        text = (Path(__file__).with_name("templates") / family.template).read_text(encoding="utf-8")
        processor.chat_template = tokenizer.chat_template = text
        terminal.say(f"the checkpoint has no chat template: lib/text/templates/{family.template} serves")
    return processor


def tokenizer_of(processor):
    """The tokenizer inside a processor; a text-only checkpoint's processor is the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def placeholders(processor) -> dict[str, str]:
    """{kind: the token that stands for a medium in a rendered text}, for the kinds that a processor takes."""
    tokens = {kind: getattr(processor, f"{kind}_placeholder_token", getattr(processor, f"{kind}_token", None))
              for kind, parts in KINDS.items() if any(getattr(processor, part, None) for part in parts)}
    return {kind: token for kind, token in tokens.items() if token}


def media_arguments(given: dict[str, list]) -> dict:
    """The processor's arguments for decoded media {kind: [medium]}; clips are sampled already."""
    arguments = {"images": given["image"], "audio": given["audio"],
                 "videos": [clip.frames for clip in given["video"]]}
    arguments = {name: media for name, media in arguments.items() if media}
    if given["video"]:
        arguments["videos_kwargs"] = {"do_sample_frames": False, "input_data_format": "channels_last",
                                      "video_metadata": [clip.metadata for clip in given["video"]]}
    return arguments


def adds_first_token(processor, text: str) -> bool:
    """Whether the tokenizer has to add its first token (bos) to a rendered text.

    It does so in a processor's apply_chat_template if the template, as LLaVA's, writes none. A tokenizer's
    own apply_chat_template never adds one.
    """
    tokenizer = tokenizer_of(processor)
    return processor is not tokenizer and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def opening_of(processor) -> str:
    """The token that a processor, as Molmo2's, puts before a text that lacks it; "" where it puts none."""
    tokenizer = tokenizer_of(processor)
    first = tokenizer.bos_token or tokenizer.eos_token
    if processor is tokenizer or not first:
        return ""
    plain, opened = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (".", f"{first}."))
    with contextlib.suppress(ValueError, TypeError, AttributeError):             # some take no text alone
        made = processor(text=["."], add_special_tokens=False)["input_ids"][0]
        return first if [*made] == opened != plain else ""
    return ""


def special_tokens(processor) -> re.Pattern:
    """A pattern for every string that the tokenizer makes a special token, media placeholders included."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*placeholders(processor).values()}
    longest_first = sorted(special, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def stop_tokens(path, processor, revision: str | None = None) -> tuple[str, ...]:
    """The tokens at which a checkpoint's generation stops; () where it has no generation_config.json."""
    from transformers import GenerationConfig
    try:
        ids = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(tokenizer_of(processor).convert_ids_to_tokens([i for i in ids if i is not None]))

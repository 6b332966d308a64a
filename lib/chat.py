"""chat: conversations to text, ids and labels, through the checkpoint's own chat template and processor.

`conversations` renders a row and finds the characters that the model has to write; `Encoder` makes the tensors. The same encoder
serves 02's measuring and preview, 05's workers and 06's questions, so nothing can differ between them.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import registry
from lib.media import open_image
from lib.sources import RowError
from lib.stage import StageError

IGNORE_INDEX = -100                       # what torch's cross-entropy skips
SENTINEL = "⟦reply⟧"                      # stands in for a reply when its place in the render is looked for


def tokenizer_of(processor):
    """The tokenizer inside a processor; a text-only checkpoint's processor is the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def load_processor(path, kind: str | None = None, **options):
    """The processor of a checkpoint (its tokenizer if it is text-only), padding on the right; `kind` names a class."""
    import transformers
    cls = getattr(transformers, kind or "AutoProcessor", None)
    if cls is None:
        raise StageError(f"processor_type: transformers {transformers.__version__} has no class {kind!r}",
                         "leave processor_type out: it is found by itself")
    try:
        processor = cls.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise StageError(f"base_model: no processor could be loaded from {path}: {str(error).splitlines()[0]}",
                         "name a folder or model id that holds the tokenizer and processor files") from None
    tokenizer_of(processor).padding_side = "right"
    return processor


def special_tokens(processor) -> re.Pattern:
    """Matches every string that the tokenizer turns into a special token, media placeholders included."""
    special = {token.content for token in tokenizer_of(processor).added_tokens_decoder.values() if token.special}
    media = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")} - {None}
    longest_first = sorted(special | media, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


# ------------------------------------------------------------------------------------- rows to text and spans

@dataclass
class Conversation:
    """A rendered conversation and the (start, end) characters in it that are trained."""
    text: str
    spans: list[tuple[int, int]]


@dataclass
class Reply:
    """An assistant turn in a render: its characters, end-of-turn token included where the template wrote one."""
    start: int
    end: int
    ended: bool


class Template:
    """A processor's chat template: renders messages and knows which strings in a text would become special tokens."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        if not getattr(processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise StageError(f"{type(processor).__name__}: the checkpoint has no chat template",
                             "write chat_template: a .jinja file or the template itself into the recipe")
        self.special = special_tokens(processor)
        self.plain_content = False        # True once this template turned out to need strings, not typed parts
        self.without_end = 0              # assistant turns that the template didn't end: eos was put there

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """The conversation's text; `prompt` adds the header that asks for the next assistant turn."""
        if self.plain_content:
            messages = [{**m, "content": "".join(p["text"] for p in m["content"])} for m in messages]
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise what they like: one of the kit's three boundaries
            raise RowError(f"the chat template refuses this conversation: {error}",
                           "change the order of roles, or give a chat_template that takes it") from None

    def conversations(self, messages: list[dict]) -> list[Conversation]:
        """The samples of a row: one with every reply, and one more for each reply that later turns rewrite.

        Raises RowError where the render can't be trusted: a text that is dropped, changed or holds special tokens.
        """
        self._check_texts(messages)
        full = self._checked_render(messages)
        shared, apart = [], []
        for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            upto = self.render(messages[:index + 1])
            reply = self._reply(messages[:index + 1], upto)
            if full.startswith(upto[:reply.end]):
                shared.append(reply)
            else:
                apart.append(self._ended(upto, [reply]))
        if not shared and not apart:
            raise RowError("no assistant turn: nothing to learn", "add an assistant message, or remove the row")
        return [self._ended(full, shared), *apart] if shared else apart

    def _check_texts(self, messages):
        for number, message in enumerate(messages):
            for part in message["content"]:
                found = self.special.search(part["text"]) if part["type"] == "text" else None
                if found:
                    raise RowError(f"message {number} ({message['role']}) spells the special token {found.group()!r}",
                                   "remove it from the text; pictures are typed parts, never tokens in a text")

    def _checked_render(self, messages) -> str:
        """The full render, in which every text must stand as given or trimmed, in order, and never as a repr."""
        try:
            full, missing = self.render(messages), None
            missing = first_missing(full, messages)
        except RowError:
            if self.plain_content or has_media(messages):
                raise
            missing = "refused"
        if missing is None:
            return full
        if self.plain_content or has_media(messages):
            raise RowError(f"the chat template drops or changes this text: {missing[:60]!r}",
                           "give a chat_template that renders every message as it stands")
        self.plain_content = True
        return self._checked_render(messages)

    def _reply(self, messages: list[dict], upto: str) -> Reply:
        """Where the last message stands in its render."""
        prompt = self.render(messages[:-1], prompt=True) if len(messages) > 1 else None
        content = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        if prompt is not None and upto.startswith(prompt):
            start = len(prompt)
        else:
            start = self._start_by_sentinel(messages, upto)
        shown = content if content and content in upto[start:] else content.strip()
        stop = upto.rindex(shown) + len(shown) if shown else len(upto.rstrip())
        if stop < start:
            raise RowError("the reply can't be found in the chat template's render", "give another chat_template")
        ending = re.compile(rf"\s*(?:{self.special.pattern})").match(upto, stop)
        if ending:
            return Reply(start, ending.end(), ended=True)
        rest = upto[stop:].rstrip()                # an end of turn in plain characters
        return Reply(start, stop + len(rest), ended=bool(rest))

    def _start_by_sentinel(self, messages, upto: str) -> int:
        """Where the last reply starts, for templates whose generation prompt is no prefix of the finished turn."""
        marked = [*messages[:-1], {**messages[-1], "content": [{"type": "text", "text": SENTINEL}]}]
        before, found, _ = self.render(marked).partition(SENTINEL)
        if not found or not upto.startswith(before) or has_media(messages[-1:]):
            raise RowError("the chat template's generation prompt is no prefix of the finished turn",
                           "give a chat_template whose finished turns start as its generation prompt ends")
        return len(before)

    def _ended(self, text: str, replies: list[Reply]) -> Conversation:
        """The conversation with the tokenizer's eos put behind each reply that the template left without an end."""
        spans, shift, eos = [], 0, self.tokenizer.eos_token
        for reply in replies:
            start, end = reply.start + shift, reply.end + shift
            if not reply.ended:
                if eos is None:
                    raise StageError("the chat template ends no turn, and the tokenizer has no eos token to do it",
                                     "give a chat_template that writes an end-of-turn token after each reply")
                text, end, shift = text[:end] + eos + text[end:], end + len(eos), shift + len(eos)
                self.without_end += 1
            spans.append((start, end))
        return Conversation(text, spans)


def has_media(messages: list[dict]) -> bool:
    """Whether any part of the messages is not text."""
    return any(part["type"] != "text" for message in messages for part in message["content"])


def first_missing(render: str, messages: list[dict]) -> str | None:
    """The first text that doesn't stand in the render, as given or trimmed, in order; a system text may move."""
    place = 0
    for message in messages:
        for text in (part["text"] for part in message["content"] if part["type"] == "text"):
            found = render.find(text.strip(), 0 if message["role"] == "system" else place)
            if found < 0 or re.search(r"""\[\{['"]type['"]: ['"]""", render) and "'type'" not in text:
                return text
            place = place if message["role"] == "system" else found + len(text.strip())
    return None


# ------------------------------------------------------------------------------------------ samples to tensors

@dataclass
class Encoder:
    """Makes a sample's tensors: `encoder(sample)`. Plain data and the processor only, so workers can be spawned.

    never_trained: ids that are out of the labels wherever they stand (media placeholders and their wrappers).
    """
    processor: object
    collate: str
    never_trained: tuple[int, ...]

    @classmethod
    def of(cls, processor, family: registry.Family) -> "Encoder":
        """The encoder of a family's processor."""
        tokenizer = tokenizer_of(processor)
        ids = {i for kind in ("image", "video", "audio") for i in getattr(processor, f"{kind}_token_ids", [])}
        ids |= {tokenizer.convert_tokens_to_ids(token) for token in family.wrappers}
        return cls(processor, family.collate, tuple(sorted(ids - {None, tokenizer.unk_token_id})))

    def save(self, folder: Path) -> None:
        """Write processor and encoder facts, so that `load` gives the same encoder in any later process."""
        self.processor.save_pretrained(folder)
        facts = {"collate": self.collate, "never_trained": list(self.never_trained)}
        (folder / "encoder.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False) -> "Encoder":
        """The encoder that 02 saved in its processor folder."""
        facts = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
        return cls(processor, facts["collate"], tuple(facts["never_trained"]))

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; masked out by attention_mask and IGNORE_INDEX, so eos serves where none is."""
        tokenizer = tokenizer_of(self.processor)
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels [1, T] and the family's media tensors, of one sample."""
        spans = [(span["start"], span["end"]) for span in sample["spans"]]
        return self.encode(sample["text"], spans, [open_image(medium) for medium in sample["media"]])

    def encode(self, text: str, spans: list[tuple[int, int]], images: list) -> dict[str, torch.Tensor]:
        """The tensors of a text with trained character spans and its pictures."""
        batch = self._process(text, images, return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        replaced = (batch.pop("text_replacement_offsets", None) or [[]])[0]
        spans = [tuple(expanded(place, replaced) for place in span) for span in spans]
        media_spans = [tuple(r["new_span"]) for r in replaced]
        cuts = {place for span in spans for place in span}
        if straddled(offsets, cuts):
            offsets = self._tokenize_apart(batch, stitched(text, replaced), sorted(cuts))
        ids = batch["input_ids"][0].tolist()
        trained = covered(offsets, spans, media_spans)
        labels = [i if keep and i not in self.never_trained else IGNORE_INDEX for i, keep in zip(ids, trained)]
        batch["labels"] = torch.tensor([labels])
        return batch

    def prompt(self, sample: dict) -> tuple[str, list, str]:
        """(text up to the last reply, the pictures before it, that reply's text without its end of turn)."""
        start, end = sample["spans"][-1]["start"], sample["spans"][-1]["end"]
        text = sample["text"][:start]
        token = getattr(self.processor, "image_token", None)
        count = text.count(token) if token and sample["media"] else 0
        reply = special_tokens(self.processor).sub("", sample["text"][start:end]).strip()
        return text, [open_image(medium) for medium in sample["media"][:count]], reply

    def _process(self, text: str, images: list, **options) -> dict:
        options = {"return_tensors": "pt", "add_special_tokens": False, **options}
        if self.processor is tokenizer_of(self.processor):
            return dict(self.processor([text], **options))
        return dict(self.processor(text=[text], images=images or None, return_text_replacement_offsets=True, **options))

    def _tokenize_apart(self, batch: dict, text: str, cuts: list[int]) -> list[tuple[int, int]]:
        """Tokenize prompt and reply apart, as inference would, where the tokenizer merged across their seam.

        Replaces the [1, T] tensors of `batch` and returns the new offsets. Token types follow their ids.
        """
        tokenizer, ids, offsets = tokenizer_of(self.processor), [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            piece = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            ids += piece["input_ids"]
            offsets += [(a + start, b + start) for a, b in piece["offset_mapping"]]
        old_ids = batch["input_ids"][0].tolist()
        types = {key: dict(zip(old_ids, batch[key][0].tolist())) for key in batch if key.endswith("token_type_ids")}
        if tokenizer.decode(ids) != tokenizer.decode(old_ids):
            raise RowError("the tokenizer merges the end of the prompt with the start of the reply",
                           "start the reply with another character (no space or newline)")
        for key, kind in types.items():
            batch[key] = torch.tensor([[kind.get(i, 0) for i in ids]])
        batch["input_ids"] = torch.tensor([ids])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return offsets


def expanded(place: int, replaced: list[dict]) -> int:
    """A character position of the rendered text, after the processor replaced media placeholders."""
    return place + sum((r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0])
                       for r in replaced if r["span"][1] <= place)


def stitched(text: str, replaced: list[dict]) -> str:
    """The text in which the processor's replacements stand in place of the media placeholders."""
    pieces, last = [], 0
    for r in replaced:
        pieces += [text[last:r["span"][0]], r["replacement"]]
        last = r["span"][1]
    return "".join([*pieces, text[last:]])


def extents(offsets: list) -> list[tuple[int, int]]:
    """Each token's (start, end) characters, where a start is the end of the token before.

    Byte-level tokenizers leave a token's leading space out of its offsets; that space is the token's all the same.
    """
    result, last = [], 0
    for start, end in offsets:
        result.append((min(start, last), end))
        last = max(last, end)
    return result


def straddled(offsets: list, cuts: set[int]) -> bool:
    """Whether a token lies on both sides of a cut."""
    return any(start < cut < end for start, end in extents(offsets) for cut in cuts)


def covered(offsets: list, spans: list, without: list) -> list[bool]:
    """For each token, whether it lies in a trained span and in none of the spans `without`."""
    def inside(token, ranges):
        return any(start <= token[0] and token[1] <= end for start, end in ranges)
    return [end > start and inside((start, end), spans) and not inside((start, end), without)
            for start, end in extents(offsets)]

"""template: conversations as text, by the checkpoint's own chat template, and the characters in it that the model writes.

A reply is what a render gains by it: the render up to the reply without the one before it that asks for it. Where the turn
ends is seen by rendering a mark in place of the reply's text. Real templates drop, trim and rewrite, so each of these
renders is checked against the others, and what doesn't fit is a RowError, never a guess.

Fork me to: train on other words (Template.conversations decides what a sample is, Template._reply what is trained in it).
"""
import re
from dataclasses import dataclass

from jinja2 import TemplateSyntaxError

from lib.sources import RowError
from lib.stage import StageError

MARK = "⟦mark⟧"                           # stands in for a text whose place in the render is looked for
QUOTED_TYPE = re.compile(r"""(['"])type\1: """)         # what a list of typed parts looks like, printed as it is
MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class Conversation:
    """A sample's text, its trained (start, end) characters, and how many of the row's media it shows.

    `ends_added` counts the replies that the template left without an end of turn, which is put there.
    """
    text: str
    spans: list[tuple[int, int]]
    media: int
    ends_added: int


@dataclass(frozen=True)
class Reply:
    """The trained characters of an assistant turn, several where a medium is among them; `ended` by the template or not."""
    spans: list[tuple[int, int]]
    ended: bool

    @property
    def end(self) -> int:
        """Behind the last trained character."""
        return self.spans[-1][1]


def tokenizer_of(processor):
    """The tokenizer inside a processor; a text-only checkpoint's processor is the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def special_tokens(processor) -> re.Pattern:
    """Matches every string that the tokenizer turns into a special token, media placeholders included."""
    tokenizer = tokenizer_of(processor)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {getattr(processor, f"{kind}_token", None) for kind in MEDIA}
    longest_first = sorted(special - {None, ""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class Template:
    """A processor's chat template.

    stops: the tokens at which the checkpoint's generation stops. They tell whether a template whose turns have no end of
    their own means the next turn's header to be it.
    """

    def __init__(self, processor, stops: tuple[str, ...] = ()):
        self.processor, self.stops = processor, stops
        if not processor.chat_template:
            raise StageError(f"base_model: this {type(processor).__name__} has no chat template",
                             "name a .jinja file in the recipe: chat_template: …; or take an instruction-tuned checkpoint")
        self.special = special_tokens(processor)
        self.typed = {"user": True}                       # which roles' contents are rendered from typed parts
        self.typed["user"] = self._takes_parts([], "user")
        asked = [{"role": "user", "content": text_parts("x")}]
        self.typed |= {role: self._takes_parts(asked, role) for role in ("system", "assistant", "tool")}

    # -------------------------------------------------------------------------------------------- messages to text

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """The conversation's text; `prompt` adds the header that asks for the next reply. RowError if it is refused."""
        try:
            return self.processor.apply_chat_template([self._shaped(m) for m in messages], tokenize=False,
                                                      add_generation_prompt=prompt)
        except TemplateSyntaxError as error:
            raise StageError(f"chat_template: line {error.lineno}: {error.message}", "mend the template") from None
        except Exception as error:  # templates raise what they like: one of the kit's three boundaries
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(f"the chat template refuses this conversation: {reason}",
                           "change the order of roles, or name a chat_template that takes it") from None

    def _shaped(self, message: dict) -> dict:
        """The message as this template takes it: typed parts, or the text alone."""
        if has_media(message) or self.typed.get(message["role"], True):
            return message
        return {**message, "content": "".join(texts_of(message))}

    def _takes_parts(self, before: list[dict], role: str) -> bool:
        """Whether typed parts of a role come out as their text, rather than as an error, as nothing or as a repr."""
        self.typed[role] = True
        around = [{"role": role, "content": text_parts(MARK)}, *before] if role == "system" else \
                 [*before, {"role": role, "content": text_parts(MARK)}]
        try:
            text = self.render(around)
        except RowError:
            return False
        return MARK in text and not QUOTED_TYPE.search(text)

    # -------------------------------------------------------------------------------------------- rows to samples

    def conversations(self, messages: list[dict]) -> list[Conversation]:
        """The samples of a row: one with every reply, and one more for each reply that later turns rewrite.

        Raises RowError where a text is dropped or changed or holds a special token, and where a reply isn't found exactly.
        """
        refuse_special(messages, self.special)
        full = self.render(messages)
        self._check_others(messages, full)
        shared, apart = [], []
        for last in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            upto = self.render(messages[:last + 1])
            reply = self._reply(messages[:last + 1], upto)
            if full.startswith(upto[:reply.end]):
                shared.append(reply)
            else:
                apart.append(self._ended(upto, messages[:last + 1], [reply]))
        if not any(text.strip() for m in messages if m["role"] == "assistant" for text in texts_of(m)):
            raise RowError("nothing to learn: no assistant message has a text",
                           "write what the assistant should answer, or remove the row")
        return [self._ended(full, messages, shared), *apart] if shared else apart

    def _check_others(self, messages: list[dict], full: str) -> None:
        """RowError where the render lacks a text that isn't a reply: `_reply` looks after those."""
        texts, marked = [], []
        for message in messages:
            parts = message["content"]
            if message["role"] != "assistant":
                places = iter(range(len(texts), len(texts) + len(parts)))
                texts += texts_of(message)
                parts = [{"type": "text", "text": f"{MARK}{next(places)}."} if part["type"] == "text" else part
                         for part in parts]
            marked.append({**message, "content": parts})
        render = self.render(marked)
        for place, text in enumerate(texts):
            if text.strip() and (f"{MARK}{place}." not in render or text.strip() not in full):
                raise RowError(f"the chat template drops or changes this text: {text.strip()[:60]!r}",
                               "name a chat_template that renders every message as it stands")

    def _reply(self, messages: list[dict], upto: str) -> Reply:
        """Where the last message, an assistant's, stands in the render of these messages."""
        before, reply = messages[:-1], messages[-1]
        parts, texts = reply["content"], texts_of(reply)
        if not parts or parts[-1]["type"] != "text":      # a mark behind the last medium shows where the turn ends
            parts, texts = [*parts, *text_parts("")], [*texts, ""]
        marks = [part if part["type"] != "text" else {"type": "text", "text": MARK} for part in parts]
        gaps = self.render([*before, {**reply, "content": marks}]).split(MARK)
        prompt = self.render(before, prompt=True) if before else ""
        start = next((len(head) for head in (prompt, gaps[0]) if head and upto.startswith(head)), None)
        stop = len(upto) - len(gaps[-1])
        if len(gaps) != len(texts) + 1 or start is None or not start <= stop or not upto.endswith(gaps[-1]):
            raise lost("the chat template's finished turn doesn't begin or end as its prompt and other replies do")
        if not all(text.strip() in upto[start:stop] for text in texts):
            raise lost("the chat template drops or changes an assistant's text")
        spans = self._between_media(upto, start, texts, gaps) if has_media(reply) else [(start, stop)]
        ending = self.special.search(upto, stop)
        end = ending.end() if ending else len(upto.rstrip())
        ended = end > stop
        return Reply([*spans[:-1], (spans[-1][0], max(end, stop))], ended)

    def _between_media(self, upto: str, start: int, texts: list[str], gaps: list[str]) -> list[tuple[int, int]]:
        """The spans of a reply with media: its texts, without what the template writes for the media among them."""
        place, spans = len(gaps[0]), []
        if self.special.search(upto, start, place):       # a medium stands before the first text
            start = place
        for text, gap in zip(texts, gaps[1:]):
            shown = next((t for t in (text, text.strip()) if upto.startswith(t + gap, place)), None)
            if shown is None or not upto.startswith(gaps[0]):
                raise lost("the texts of an assistant's turn can't be told from the media in it")
            place += len(shown)
            spans.append((start, place))
            place += len(gap)
            if not self.special.search(gap):              # no medium between these two texts: one span
                start = spans.pop()[0]
            else:
                start = place
        return spans if spans and spans[-1][1] + len(gaps[-1]) == len(upto) else [*spans, (start, len(upto) - len(gaps[-1]))]

    def _ended(self, text: str, messages: list[dict], replies: list[Reply]) -> Conversation:
        """The conversation, with an end behind each reply that the template left without one."""
        spans, added = [], 0
        shift = 0
        for reply in replies:
            *whole, (start, end) = [(a + shift, b + shift) for a, b in reply.spans]
            if not reply.ended:
                closing = self._closing_token()
                if not text.startswith(closing, end):
                    text, shift, added = text[:end] + closing + text[end:], shift + len(closing), added + 1
                end += len(closing)
            spans += [*whole, (start, end)]
        return Conversation(text, spans, self._count_media(text, messages), added)

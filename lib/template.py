"""template: conversations as text, by the checkpoint's own chat template, and what the model writes of it.

A reply is what a render gains by it: the render up to the reply, without the one before it that asks for it.
Where its turn ends is seen by rendering a mark in place of its text. Real templates drop, trim and rewrite;
so the renders are checked against one another, and what doesn't fit is a RowError: labels are exact or there
are none.

Fork me to: train on other words (`conversations` says what a sample is, `_reply` what is trained in it).
"""
import functools
import re
from dataclasses import dataclass, replace

from lib.messages import NOUNS, RowError, count, has_media, text_parts, texts_of
from lib.processor import placeholders, special_tokens, tokenizer_of
from lib.render import MARK, Renderer
from lib.stage import StageError


@dataclass(frozen=True)
class Conversation:
    """A sample's text, the (start, end) characters in it that are trained, and how many media it shows.

    `ends_added` counts the replies that the template left without an end of turn, which the kit put there.
    `put_in` is what the template says by itself, such as a default system prompt; `tells_day`, whether it
    says the day.
    """
    text: str
    spans: list[tuple[int, int]]
    media: int
    ends_added: int
    put_in: tuple[str, ...] = ()
    tells_day: bool = False


@dataclass(frozen=True)
class Reply:
    """An assistant turn's trained (start, end) characters; whether the template ended the turn."""
    spans: list[tuple[int, int]]                        # several, if media stand among them
    ended: bool


class Template(Renderer):
    """A processor's chat template, and what is trained in its renders.

    stops: the tokens at which the checkpoint's generation stops, beside the tokenizer's eos. They tell which
    of several tokens ends a turn, and whether a template that writes no end means the next header to be it.
    """

    def __init__(self, processor, stops: tuple[str, ...] = (), day: str | None = None):
        super().__init__(processor, day)
        self.stops = {*stops, tokenizer_of(processor).eos_token}
        self.special, self.placeholders = special_tokens(processor), placeholders(processor)
        self.not_words = re.compile(rf"{MARK}\d+\.|{self.special.pattern}")

    def conversations(self, messages: list[dict]) -> list[Conversation]:
        """The samples of a row: one with its replies, and one for each reply that later turns change.

        RowError where a text holds a special token, is dropped or changed, or a reply isn't found exactly.
        """
        self._check_parts(messages)
        replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(text.strip() for place in replies for text in texts_of(messages[place])):
            raise RowError("nothing to learn: no assistant message has a text",
                           "write what the assistant should answer, or remove the row")
        full = self.render(messages)
        put_in, tells_day = self._own_words(messages, full), self.tells_day(messages, full)
        shared, apart = [], []
        for place in replies:
            head = messages[:place + 1]
            upto = self.render(head)
            reply = self._reply(head, upto)
            if full.startswith(upto[:reply.spans[-1][1]]):
                shared.append(reply)
            else:                                       # learnt as it was written, before they rewrote it
                apart.append(self._ended(head, upto, [reply]))
        found = [self._ended(messages, full, shared), *apart] if shared else apart
        return [replace(conversation, put_in=put_in, tells_day=tells_day) for conversation in found]

    # ---- what can go wrong with a text ----

    def _check_parts(self, messages: list[dict]) -> None:
        """RowError where a text spells a token that only the template may write, or a medium has no token."""
        for number, message in enumerate(messages):
            who = f"message {number} ({message['role']})"
            if found := self.special.search("".join(texts_of(message))):
                raise RowError(f"{who} spells the special token {found.group()!r}",
                               'remove it; a picture is a part {"type": "image"}, not a token in a text')
            for kind in (part["type"] for part in message["content"] if part["type"] != "text"):
                if kind not in self.placeholders:
                    raise RowError(f"{who} has a {NOUNS[kind]}, and base_model takes none",
                                   f"name a base_model that takes {NOUNS[kind]}s, or remove the row")

    def _own_words(self, messages: list[dict], full: str) -> tuple[str, ...]:
        """What the template writes between the texts, without single words such as the names of roles.

        RowError where a text other than a reply's doesn't stand in the render; `_reply` sees to those.
        """
        texts, marked = {}, []
        for message in messages:
            parts = list(message["content"])
            for place, part in enumerate(parts):
                if part["type"] == "text" and part["text"].strip():
                    mark = f"{MARK}{len(texts)}."
                    parts[place] = {"type": "text", "text": mark}
                    texts[mark] = part["text"].strip() if message["role"] != "assistant" else ""
            marked.append({**message, "content": parts})
        render = self.render(marked)
        for mark, text in texts.items():
            if text and (text not in full or mark not in render):
                raise lost(text)
        pieces = self.not_words.split(render)
        return tuple(dict.fromkeys(piece.strip() for piece in pieces if len(piece.split()) > 1))

    # ---- text to spans ----

    def _reply(self, messages: list[dict], upto: str) -> Reply:
        """Where the last message, an assistant's, stands in `upto`, the render of these messages."""
        before, reply = messages[:-1], messages[-1]
        parts, texts = reply["content"], texts_of(reply)
        if not parts or parts[-1]["type"] != "text":    # a mark behind the last medium shows the turn's end
            parts, texts = [*parts, *text_parts("")], [*texts, ""]
        marks = [{"type": "text", "text": MARK} if part["type"] == "text" else part for part in parts]
        head, *gaps = self.render([*before, {**reply, "content": marks}]).split(MARK)
        prompt = self.render(before, prompt=True) if before else head
        start = next((len(known) for known in (prompt, head) if upto.startswith(known)), None)
        stop = len(upto) - len(gaps[-1]) if len(gaps) == len(texts) and upto.endswith(gaps[-1]) else 0
        first = begin_of(texts, upto[:stop])            # before `start` where the prompt opens its thought
        if start is None or stop < start or first is None or first < start and not upto.startswith(prompt):
            raise unclear("the chat template's finished turn isn't its prompt, the reply's text and an end")
        given = [text for message in before if message["role"] != "assistant" for text in texts_of(message)]
        read = upto[:min(first, start)]
        for text in map(str.strip, given):
            if text not in read:                        # some templates keep it for the last question of all
                raise lost(text)
        cuts = self._media_in(upto, start, texts, [head, *gaps]) if has_media(reply) else []
        end = self._end_of_turn(upto, stop)
        edges = [start, *(edge for cut in cuts for edge in cut), end]
        spans = list(zip(edges[::2], edges[1::2]))
        return Reply([(a, b) for a, b in spans[:-1] if a < b] + spans[-1:], ended=end > stop)

    def _end_of_turn(self, upto: str, stop: int) -> int:
        """Where the turn ends whose text ends at `stop`: behind the next special token, in most templates."""
        found = self.special.search(upto, stop)
        if not found:
            return max(stop, len(upto.rstrip()))
        first = found.end()
        while found:                                    # Cohere ends with two tokens, and stops at the second
            if found.group() in self.stops:
                return found.end()
            found = self.special.match(upto, found.end())
        return first

    def _media_in(self, upto: str, start: int, texts: list[str], gaps: list[str]) -> list[tuple[int, int]]:
        """The characters that the template wrote for the media among a reply's texts, wrappers and all."""
        place, cuts = len(gaps[0]), []
        known = upto.startswith(gaps[0])
        if self.special.search(upto, start, place):
            cuts.append((start, place))
        for text, gap in zip(texts, gaps[1:]):
            shown = next((t for t in (text, text.strip()) if upto.startswith(t + gap, place)), None)
            if not known or shown is None:
                raise unclear("the media in an assistant's turn can't be told from its text")
            place += len(shown)
            cuts.append((place, place + len(gap)))
            place += len(gap)
        return [(a, b) for a, b in cuts[:-1] if self.special.search(upto, a, b)]    # the last ends the turn

    def _ended(self, messages: list[dict], text: str, replies: list[Reply]) -> Conversation:
        """The conversation, with an end put behind each reply that the template left without one."""
        spans, added = [], 0
        for reply in replies:
            shift = added * len(self.closing) if added else 0
            *whole, (start, end) = [(a + shift, b + shift) for a, b in reply.spans]
            if not reply.ended:
                if not text.startswith(self.closing, end):
                    text, added = text[:end] + self.closing + text[end:], added + 1
                end += len(self.closing)
            spans += [*whole, (start, end)]
        return Conversation(text, spans, self._count_media(messages, text), added)

    @functools.cached_property
    def closing(self) -> str:
        """What ends a turn that the template doesn't: the next header if generation stops at it, else eos."""
        turns = [{"role": role, "content": text_parts(text)}
                 for role, text in (("user", "x"), ("assistant", MARK), ("user", "x"))]
        header = self.special.match(self.render(turns).partition(MARK)[2].lstrip())
        if header and header.group() in self.stops:
            return header.group()
        if tokenizer_of(self.processor).eos_token is None:
            raise StageError("the chat template ends no turn, and the tokenizer has no eos token to do it",
                             "name a chat_template that writes an end-of-turn token after each reply")
        return tokenizer_of(self.processor).eos_token

    def _count_media(self, messages: list[dict], text: str) -> int:
        """How many media these messages have; RowError unless the render shows as many."""
        kinds = [part["type"] for message in messages for part in message["content"]
                 if part["type"] != "text"]
        for kind in sorted(set(kinds)):
            shown = text.count(self.placeholders[kind])
            if shown != kinds.count(kind):
                raise RowError(f"{count(kinds.count(kind), kind)} in the messages, {shown} in the render",
                               f"name a chat_template that shows every {kind}, or remove them from the row")
        return len(kinds)


def begin_of(texts: list[str], render: str) -> int | None:
    """Where the texts begin that a render ends with, in their order; None where it doesn't."""
    place = len(render.rstrip() if texts[-1].strip() else render)
    if not render[:place].endswith(texts[-1].strip()):
        return None
    for text in reversed(texts):
        place = render.rfind(text.strip(), 0, place)
        if place < 0:
            return None
    return place


def lost(text: str) -> RowError:
    """The reject of a row with a text that its render lacks where the model would read it."""
    return RowError(f"the chat template drops or changes this text: {text[:60]!r}",
                    "name a chat_template that renders every message as it stands")


def unclear(reason: str) -> RowError:
    """The reject of a row whose replies can't be told from the rest of its render."""
    return RowError(reason, "name a chat_template whose replies stand as they are given")

"""turns: where each turn's text and its end stand in a render, to the character.

A reply is what it adds to the render: the render up to the reply, minus the prompt that asks for it. A mark
rendered in place of the reply's text shows where that ends. The text of any other turn is found by such marks
alone: with the mark, the rest of the render must stay the same.

Fork me to: find turns in another way (`_reply`, `_asked`).
"""
import functools
import re
from dataclasses import dataclass

from lib.data.messages import has_media, text_parts, texts_of
from lib.data.shapes import calls_in
from lib.run.errors import StageError
from lib.text.processor import placeholders, special_tokens, tokenizer_of
from lib.text.render import MARK, Renderer, lost, stands_in, unclear

NUMBERED = re.compile(rf"{MARK}(\d+)\.")


@dataclass(frozen=True)
class Turn:
    """Where a turn stands in a render.

    spans: the (start, stop) characters of its text, several if media stand among them. end: where its end of
    turn ends; the last stop where the template writes none. is_reply: whether it is the assistant's, to which
    the kit may add an end. text_trained, end_trained: what of it is learnt.
    """
    spans: list[tuple[int, int]]
    end: int
    is_reply: bool = False
    text_trained: bool = True
    end_trained: bool = True

    @property
    def ended(self) -> bool:
        """Whether the template wrote an end of turn."""
        return self.end > self.spans[-1][1]


class Turns(Renderer):
    """A processor's chat template, and the turns in its renders.

    stops: the tokens at which the checkpoint's generation stops, beside the tokenizer's eos. They tell which
    of several tokens ends a turn, and whether in a template without ends the next header serves as one.
    """

    def __init__(self, processor, stops: tuple[str, ...] = (), day: str | None = None):
        super().__init__(processor, day)
        self.stops = {*stops, tokenizer_of(processor).eos_token}
        self.special, self.placeholders = special_tokens(processor), placeholders(processor)

    def _around(self, messages: list[dict], marks: list[dict], upto: str, shape: tuple) -> list[str]:
        """What stands before, between and behind the last message's texts in `upto`, the messages' render.

        shape: their skeleton. Where filling in the texts makes it the render, it tells the places; else the
        messages are rendered once more, with `marks` as the last one's content.
        """
        skeleton, texts = shape
        if len(marks) == 1 and texts and messages[-1]["content"][-1:] == text_parts(texts[-1]) \
                and all(text == text.strip() for text in texts):
            filled = NUMBERED.sub(lambda mark: texts[int(mark[1])], skeleton)
            behind = skeleton.partition(f"{MARK}{len(texts) - 1}.")[2]
            if filled == upto and MARK not in behind and skeleton.count(MARK) == len(texts):
                return [upto[:len(upto) - len(behind) - len(texts[-1])], behind]
        return self.render([*messages[:-1], {**messages[-1], "content": marks}]).split(MARK)

    def _reply(self, messages: list[dict], upto: str, shape: tuple | None = None) -> Turn:
        """The Turn of the last message, an assistant's, in `upto`, the messages' render.

        shape: the messages' skeleton, where it is at hand.
        """
        before, reply = messages[:-1], messages[-1]
        if reply.get("tool_calls"):
            return self._calling(before, reply, upto)
        parts, texts = reply["content"], texts_of(reply)
        if not parts or parts[-1]["type"] != "text":    # a mark behind the last medium shows the turn's end
            parts, texts = [*parts, *text_parts("")], [*texts, ""]
        head, *gaps = self._around(messages, marked(parts), upto, shape or self.skeleton(messages))
        prompt = self.render(before, prompt=True) if before else head
        start = next((len(known) for known in (prompt, head) if upto.startswith(known)), None)
        stop = len(upto) - len(gaps[-1]) if len(gaps) == len(texts) and upto.endswith(gaps[-1]) else 0
        first = begin_of(texts, upto[:stop])            # before `start` where the prompt opens its thought
        if start is None or stop < start or first is None or first < start and not upto.startswith(prompt):
            raise unclear("the chat template's finished turn isn't its prompt, the reply's text and an end")
        self._refuse_unread(before, upto[:min(first, start)])
        edges = [start, stop]
        if has_media(reply):                            # what the template wrote for them isn't trained
            shown = spans_of(texts, head, gaps, upto)
            if shown is None:
                raise unclear("the media in an assistant's turn can't be told from its text")
            gaps = zip([start, *(b for _, b in shown[:-1])], [a for a, _ in shown])
            edges[1:1] = [edge for gap in gaps if self.special.search(upto, *gap) for edge in gap]
        spans = list(zip(edges[::2], edges[1::2]))
        return Turn([(a, b) for a, b in spans[:-1] if a < b] + spans[-1:],
                    self._end_of_turn(upto, stop), True)

    def _calling(self, before: list[dict], reply: dict, upto: str) -> Turn:
        """The Turn of a reply with tool calls: all after the prompt, up to an end as a plain reply has it."""
        prompt = self.render(before, prompt=True)
        plain = self.render([*before, {"role": "assistant", "content": text_parts(MARK)}]).split(MARK)
        start, stop = len(prompt), len(upto) - len(plain[-1])
        if has_media(reply) or len(plain) != 2 or not upto.startswith(prompt) or stop < start \
                or not upto.endswith(plain[-1]):
            raise unclear("the chat template's turn with tool calls doesn't end as one without")
        for text in [*texts_of(reply), *calls_in([reply])]:
            if not stands_in(text, upto[start:stop]):
                raise lost(text)
        self._refuse_unread(before, prompt)
        return Turn([(start, stop)], self._end_of_turn(upto, stop), True)

    def _refuse_unread(self, before: list[dict], read: str) -> None:
        """Raise RowError where an earlier text isn't read before the reply, as some templates move texts."""
        for message in before:
            for text in texts_of(message):
                if message["role"] != "assistant" and text.strip() not in read:
                    raise lost(text)

    def _asked(self, messages: list[dict], place: int, full: str) -> Turn | None:
        """The Turn of a message that is no reply, in the render of all messages; None if it has no text."""
        texts = texts_of(messages[place])
        if not any(text.strip() for text in texts):
            return None
        asked = {**messages[place], "content": marked(messages[place]["content"])}
        head, *gaps = self.render([*messages[:place], asked, *messages[place + 1:]]).split(MARK)
        spans = spans_of(texts, head, gaps, full)
        if spans is None:
            raise unclear(f"message {place} ({asked['role']}) can't be told from the rest of its render")
        spans = [(start, end) for start, end in spans if start < end]
        start, stop = spans[0][0], spans[-1][1]
        lead = len(full[:start]) - len(full[:start].rstrip(" "))     # a space belongs to the token behind it
        ends = self.special.match(full, len(full) - len(full[stop:].lstrip()))
        ended = ends and ends.group() in self.ends
        return Turn([(start - lead, spans[0][1]), *spans[1:]], ends.end() if ended else stop)

    def _end_of_turn(self, upto: str, stop: int) -> int:
        """Where a turn ends whose text ends at `stop`: behind the next special token, in most templates."""
        found = self.special.search(upto, stop)
        if not found:
            return max(stop, len(upto.rstrip()))
        first = found.end()
        while found:                                    # Cohere ends with two tokens, and stops at the second
            if found.group() in self.stops:
                return found.end()
            found = self.special.match(upto, found.end())
        return first

    @functools.cached_property
    def _behind_reply(self) -> str | None:
        """The special token that stands behind a reply's text when another turn follows, if one does."""
        turns = [{"role": role, "content": text_parts(text)}
                 for role, text in (("user", "x"), ("assistant", MARK), ("user", "x"))]
        found = self.special.match(self.render(turns).partition(MARK)[2].lstrip())
        return found.group() if found else None

    @functools.cached_property
    def ends(self) -> set[str]:
        """The tokens that end a turn: those at which generation stops, and the one the template writes."""
        return self.stops | {self._behind_reply}

    @functools.cached_property
    def closing(self) -> str:
        """The token added to a turn without an end: the next header's if generation stops at it, else eos."""
        if self._behind_reply in self.stops and self._behind_reply:
            return self._behind_reply
        if tokenizer_of(self.processor).eos_token is None:
            raise StageError("the chat template ends no turn, and the tokenizer has no eos token to do it",
                             "name a chat_template that writes an end-of-turn token after each reply")
        return tokenizer_of(self.processor).eos_token


def marked(parts: list[dict]) -> list[dict]:
    """A message's parts with a mark in place of each text."""
    return [{"type": "text", "text": MARK} if part["type"] == "text" else part for part in parts]


def spans_of(texts: list[str], head: str, gaps: list[str], render: str) -> list[tuple[int, int]] | None:
    """The spans of texts in a render that is head, text, gap, text, gap …; None where it isn't."""
    if len(texts) != len(gaps) or not render.startswith(head):
        return None
    spans, place = [], len(head)
    for text, gap in zip(texts, gaps):
        shown = next((t for t in (text, text.strip()) if render.startswith(t + gap, place)), None)
        if shown is None:
            return None
        spans.append((place, place + len(shown)))
        place += len(shown) + len(gap)
    return spans if place == len(render) else None


def begin_of(texts: list[str], render: str) -> int | None:
    """Where the texts begin with which a render ends, in their order; None where it doesn't end so."""
    place = len(render.rstrip() if texts[-1].strip() else render)
    if not render[:place].endswith(texts[-1].strip()):
        return None
    for text in reversed(texts):
        place = render.rfind(text.strip(), 0, place)
        if place < 0:
            return None
    return place

"""template: conversations as text, by the checkpoint's own chat template, and which characters are trained.

Real templates drop, trim and rewrite texts. So renders are checked against one another (turns.py), and
what doesn't fit is a RowError: labels are exact, or there are none.

Fork me to: train on other words (`conversations` says what a sample is).
"""
import contextlib
import functools
import re
from dataclasses import dataclass, replace

from lib.data.messages import texts_of
from lib.data.parts import NOUNS
from lib.data.shapes import calls_in, name_in, strings_in
from lib.run.errors import RowError
from lib.run.terminal import counted
from lib.text.render import MARK, lost, stands_in
from lib.text.turns import Turn, Turns


@dataclass(frozen=True)
class Conversation:
    """A sample's text, the (start, end) characters in it that are trained, and how many media it shows.

    reply: the characters of the answer that 06 asks for: the last reply that trains, or else the last reply,
    or else the last trained text. ends_added: the number of replies that the template left without an end of
    turn, and to which the kit added one. put_in: what the template writes by itself, such as a default system
    prompt. tells_day: whether it writes the date.
    """
    text: str
    spans: list[tuple[int, int]]
    reply: tuple[int, int]
    media: int
    ends_added: int
    put_in: tuple[str, ...] = ()
    tells_day: bool = False


@dataclass(frozen=True)
class Labels:
    """What is trained: the texts of these roles, and ends of turns.

    ends: "turn" (of the trained texts' turns), "all", "last" or "none". A message's own `train` wins over its
    role.
    """
    roles: tuple[str, ...] = ("assistant",)
    ends: str = "turn"

    def text_of(self, message: dict) -> bool:
        """Whether a message's text is trained."""
        return message.get("train", message["role"] in self.roles)

    def end_of(self, message: dict, last: bool) -> bool:
        """Whether the end of a message's turn is trained; last: no other turn follows."""
        return {"turn": self.text_of(message), "all": True, "last": last, "none": False}[self.ends]


class Template(Turns):
    """A processor's chat template, and what is trained in its renders; takes the arguments of Turns."""

    def __init__(self, processor, stops: tuple[str, ...] = (), day: str | None = None):
        super().__init__(processor, stops, day)
        self.not_words = re.compile(rf"{MARK}\d+\.|{self.special.pattern}")

    def conversations(self, messages: list[dict], labels: Labels = Labels()) -> list[Conversation]:
        """The samples of a row: one with its turns, and one for each trained reply that later turns change.

        RowError where a text holds a special token, is dropped or changed, or a turn isn't found exactly.
        """
        self._refuse_parts(messages)
        trained = [message for message in messages if labels.text_of(message)]
        if not any(message.get("tool_calls") or "".join(texts_of(message)).strip() for message in trained):
            who = " or ".join(labels.roles)
            raise RowError(f"nothing to learn: no {who} message has a text",
                           "write what the assistant should answer, or remove the row")
        full, shape = self.render(messages), self.skeleton(messages)
        notes = {"put_in": self._own_words(messages, full, shape),
                 "tells_day": self.tells_day(messages, full)}
        shared, apart = [], []
        for place, message in enumerate(messages):
            last = place == len(messages) - 1
            learnt = {"text_trained": labels.text_of(message), "end_trained": labels.end_of(message, last)}
            if not any(learnt.values()):
                continue
            if message["role"] != "assistant":
                turn, upto = self._asked(messages, place, full), full
            else:
                upto = full if last else self.render(messages[:place + 1])
                turn = self._reply(messages[:place + 1], upto, shape if last else None)
            if turn and full.startswith(upto[:turn.end]):
                shared.append(replace(turn, **learnt))
            elif turn and learnt["text_trained"]:       # learnt as it was written, before they rewrote it
                learnt["end_trained"] = labels.end_of(message, last=True)
                apart.append(self._sample(messages[:place + 1], upto, [replace(turn, **learnt)], notes))
            if learnt["text_trained"]:
                thought = message.get("reasoning_content", "")
                if not stands_in(thought, upto[turn.spans[0][0]:turn.end] if turn else ""):
                    raise lost(thought)
        whole = any(turn.text_trained for turn in shared)
        return [self._sample(messages, full, shared, notes), *apart] if whole else apart

    # ---- what can go wrong with a text ----

    def _refuse_parts(self, messages: list[dict]) -> None:
        """Raise RowError where a text spells a special token, or base_model takes no such medium."""
        for number, message in enumerate(messages):
            who = f"message {number} ({message['role']})"
            extras = {key: value for key, value in message.items() if key not in ("role", "content")}
            if found := self.special.search("".join(texts_of(message)) + "\n".join(strings_in(extras, True))):
                raise RowError(f"{who} spells the special token {found.group()!r}",
                               'remove it; a picture is a part {"type": "image"}, not a token in a text')
            for kind in (part["type"] for part in message["content"] if part["type"] != "text"):
                if kind not in self.placeholders:
                    raise RowError(f"{who} has a {NOUNS[kind]}, and base_model takes none",
                                   f"name a base_model that takes {NOUNS[kind]}s, or remove the row")

    def _own_words(self, messages: list[dict], full: str, shape: tuple[str, list]) -> tuple[str, ...]:
        """What the template writes between the texts, without single words such as the names of roles.

        Raises RowError where a text isn't in the render, except a reply's, which `_reply` checks.
        """
        render, texts = shape
        roles = [message["role"] for message in messages for text in texts_of(message) if text.strip()]
        for number, (role, text) in enumerate(zip(roles, map(str.strip, texts), strict=True)):
            if role != "assistant" and (text not in full or f"{MARK}{number}." not in render):
                raise lost(text)
        calls = [*calls_in(messages), *(name_in(tool) for tool in self.options.get("tools") or ())]
        for text in calls:
            if not stands_in(text, full):
                raise lost(text)
        thoughts = [message["reasoning_content"] for message in messages if "reasoning_content" in message]
        return tuple(piece for piece in pieces_of(render, self.not_words)
                     if not any(stands_in(text, piece) for text in calls + thoughts))

    # ---- turns to a sample ----

    def _sample(self, messages: list[dict], text: str, turns: list[Turn], notes: dict) -> Conversation:
        """The Conversation of these turns, with an end added to each trained reply that has none.

        notes: what the render says by itself, as a Conversation has it.
        """
        spans, added, replies = [], 0, []
        for turn in sorted(turns, key=lambda turn: turn.end):
            shift = added * len(self.closing) if added else 0
            end = turn.end + shift
            *whole, (start, stop) = [(a + shift, b + shift) for a, b in turn.spans]
            if turn.is_reply:
                replies.append((turn.text_trained, ((whole or [(start, stop)])[0][0], stop)))
            if turn.is_reply and turn.end_trained and not turn.ended:
                if not text.startswith(self.closing, end):
                    text, added = text[:end] + self.closing + text[end:], added + 1
                end += len(self.closing)
            first = start if turn.text_trained else stop
            last = (first, end if turn.end_trained else stop)
            spans += [*(whole if turn.text_trained else ()), *([last] if first < last[1] else ())]
        reply = max(replies)[1] if replies else self._untrained_reply(messages, text) or spans[-1]
        return Conversation(text, spans, reply, self._count_media(messages, text), added, **notes)

    def _untrained_reply(self, messages: list[dict], text: str) -> tuple[int, int] | None:
        """The characters of the last reply in a text; None where none can be told exactly."""
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        with contextlib.suppress(RowError, IndexError):
            upto = self.render(messages[:places[-1] + 1])
            turn = self._reply(messages[:places[-1] + 1], upto)
            return (turn.spans[0][0], turn.spans[-1][1]) if text.startswith(upto[:turn.end]) else None

    def _count_media(self, messages: list[dict], text: str) -> int:
        """How many media these messages have; RowError unless the render shows as many."""
        kinds = [part["type"] for message in messages for part in message["content"]
                 if part["type"] != "text"]
        for kind in sorted(set(kinds)):
            shown = text.count(self.placeholders[kind])
            if shown != kinds.count(kind):
                raise RowError(f"{counted(kinds.count(kind), kind)} in the messages, {shown} in the render",
                               f"name a chat_template that shows every {kind}, or remove them from the row")
        return len(kinds)


@functools.lru_cache(maxsize=256)
def pieces_of(render: str, not_words: re.Pattern) -> tuple[str, ...]:
    """The pieces of text between a render's marks, each once, without single words."""
    pieces = [piece.strip() for piece in not_words.split(render) if len(piece.split()) > 1]
    return tuple(dict.fromkeys(pieces))

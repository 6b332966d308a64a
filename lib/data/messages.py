"""messages: a row of any data set as the one shape that the rest of the kit knows.

A message is {role, content}, its content a list of parts: {"type": "text", "text": …} or {"type": KIND}, with
image, audio or video for KIND. The media themselves stand beside the messages, in the order of their parts.

What a template needs beside it stays in a message: tool_calls, reasoning_content, name, and `train` for 02.

Fork me to: take media from other columns (`normalise`); shapes.py knows the shapes of rows, parts.py those of
parts.
"""
import re
from itertools import chain

from lib.data.parts import NOUNS, part_of
from lib.data.shapes import (
    EXTRAS, NOTHING, ROLES, Shape, calls_of, conversation_of, first_of, from_json, listed, name_of,
    shortened, strings_in)
from lib.run.errors import RowError
from lib.run.terminal import counted

MEDIA_COLUMNS = {"images": "image", "image": "image", "audios": "audio", "audio": "audio",
                 "videos": "video", "video": "video"}
SURROGATE = re.compile("[\ud800-\udfff]")
WRITE = 'write {"role": …, "content": …}'


def normalise(row, shape: Shape = Shape()) -> tuple[list[dict], list]:
    """(messages, media) of a row, the media as the row gives them. RowError where it can't be one.

    Media named in parts keep their place. Those of a column fill the bare parts of its kind, over all turns
    in order or by their `index`. Where the row has no such part, they stand where the texts have tags such as
    <image>, if these are as many as they, or go before the first user text. A column holds one medium, a list
    of them (or its JSON) or none; a clip may itself be a list, of its frames.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, not {name_of(row)}", 'write {"messages": […]}')
    columns = {kind: [medium for column, of in MEDIA_COLUMNS.items() if of == kind
                      if row.get(column) is not None for medium in listed(from_json(row[column]))]
               for kind in NOUNS}
    kinds = {kind for kind, media in columns.items() if media}
    found = conversation_of(row, shape)
    messages = [message_of(message, number, shape, kinds) for number, message in enumerate(found)]
    place_tags(messages, columns)
    present = kinds.union(part["type"] for message in messages for part in message["content"])
    for kind in NOUNS:
        if kind in present:
            fill(messages, kind, columns[kind])
        else:
            refuse_set_off(messages, kind)
    media = [part for message in messages for part in message["content"] if part["type"] != "text"]
    return messages, [part.pop("source") for part in media]


def message_of(message, number: int, shape: Shape, kinds: set[str]) -> dict:
    """A message with typed content; media are still in their parts, under "source".

    kinds: those of the row's columns; in messages of from and value, <image> in a text stands for one
    whatever their number.
    """
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {name_of(message)}, not an object", WRITE)
    word, content = (first_of(message, shape.places[name]) for name in ("role", "content"))
    role = shape.role(word)
    if role is None:
        raise RowError(f"message {number} has the role {shortened(repr(word))}",
                       f"use one of {', '.join(ROLES)}, or name its meaning under roles")
    extras = extras_of(message, number, role, shape)
    if isinstance(content, str):
        parts = with_parts(content, set() if message.get("content") is content else kinds)
    elif isinstance(content, list) or content is None and "tool_calls" in extras:
        parts = [part_of(part, number) for part in content or ()]
    else:
        raise RowError(f"message {number} ({role}) has no content", "write a text or a list of typed parts")
    found = {"role": role, "content": parts, **extras}
    if any(map(SURROGATE.search, [*texts_of(found), *strings_in(extras)])):
        raise RowError(f"message {number} ({role}) holds half a surrogate pair, which is no character",
                       "write that character whole, or remove it")
    return found


def place_tags(messages: list[dict], columns: dict[str, list]) -> None:
    """Make tags parts where a kind has no other and as many tags as its column has media.

    columns: {kind: its media}. Any other number may be words about a tag, which `fill` refuses.
    """
    texts = [text for message in messages for text in texts_of(message)]
    present = {part["type"] for message in messages for part in message["content"]}
    tagged = {kind for kind, media in columns.items() if media and kind not in present
              and sum(text.count(f"<{kind}>") for text in texts) == len(media)}
    if tagged:
        for message in messages:
            pieces = [with_parts(part["text"], tagged) if part["type"] == "text" else [part]
                      for part in message["content"]]
            message["content"] = list(chain.from_iterable(pieces))


def with_parts(text: str, kinds: set[str]) -> list[dict]:
    """A text's parts: each tag such as <image>, of one of these kinds, is a part in its place.

    The newline that sets a tag off at a text's begin or end goes with it: templates write their own.
    """
    if not kinds:
        return text_parts(text)
    tag = "|".join(f"<{kind}>" for kind in sorted(kinds))
    text = re.sub(rf"^((?:{tag})+)\n|\n((?:{tag})+)$", r"\1\2", text)
    pieces = re.split(f"({tag})", text)
    return [{"type": piece[1:-1], "source": None} if place % 2 else {"type": "text", "text": piece}
            for place, piece in enumerate(pieces) if piece or len(pieces) == 1]


def extras_of(message: dict, number: int, role: str, shape: Shape) -> dict:
    """What a message has beside role and content, for the template, and whether it trains."""
    plain, more = shape.keys
    if message.keys() <= plain:                          # which most messages are
        return {}
    who = f"message {number} ({role})"
    extras = {name: value for name in EXTRAS
              if (value := first_of(message, shape.places[name])) not in NOTHING}
    train = message.get(shape.message_field_training)
    for key, value in message.items():
        if key not in plain | more and value not in NOTHING:
            raise RowError(f"{who} has {shortened(repr(key))}, which isn't rendered",
                           "write message_field_training: weight into the recipe" if key == "weight" else
                           "remove that key, or say in message_property_mappings what it holds")
    for name in {"tool_calls", "reasoning_content"} & extras.keys():
        if role != "assistant":
            raise RowError(f"{who} has {name}, which only an assistant has", "remove that key")
    if "tool_calls" in extras:
        extras["tool_calls"] = calls_of(extras["tool_calls"], number)
    for name in extras.keys() - {"tool_calls"}:
        if not isinstance(extras[name], str):
            raise RowError(f"{who} has a {name} that is {name_of(extras[name])}", "write it as a text")
    if train not in (None, False, True):                 # which are 0 and 1, too: OpenAI's weight
        raise RowError(f"{who} has {shape.message_field_training}: {shortened(repr(train))}",
                       "write true or false there, or name another key in message_field_training")
    return extras if train is None else {**extras, "train": bool(train)}


def fill(messages: list[dict], kind: str, listed: list) -> None:
    """Give every part of this kind its source: each bare part another of the listed media."""
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    bare = [part for part in parts if part["source"] is None]
    if listed and not parts:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise RowError(f"{counted(len(listed), NOUNS[kind])}, but no user message to stand in",
                           "add a user message")
        place = next((n for n, part in enumerate(first["content"]) if part["type"] == "text"), 0)
        first["content"][place:place] = parts = [{"type": kind, "source": medium} for medium in listed]
    elif len(bare) != len(listed):
        raise RowError(f"{counted(len(bare), f'{kind} placeholder')}, but "
                       f"{counted(len(listed), f'listed {NOUNS[kind]}')}",
                       f'write one {{"type": "{kind}"}} part for each entry of the {kind} column')
    else:
        named = [part.pop("index", None) for part in bare]
        places = range(len(bare)) if named == [None] * len(bare) else named
        if any(place not in places for place in range(len(listed))):
            raise RowError(f"the {kind} parts have the indices {shortened(str(named))}, for "
                           f"{counted(len(listed), f'listed {NOUNS[kind]}')}",
                           f"name each entry of the {kind} column once, from 0, or remove every index")
        for part, place in zip(bare, places):
            part["source"] = listed[int(place)]
    for number, message in enumerate(messages):
        if any(f"<{kind}>" in text for text in texts_of(message)):
            raise RowError(f"message {number} has <{kind}> in its text, which is only characters here",
                           f'write a part {{"type": "{kind}"}} in its place, or a <{kind}> for each entry of '
                           f"the {kind} column")


def refuse_set_off(messages: list[dict], kind: str) -> None:
    """Raise RowError where a user's text is set off from tags, and the row has nothing of this kind.

    A tag amid words may be about HTML. In a line of its own, first or last, it is where LLaVA's rows have a
    medium: the row may keep it in a column that isn't read.
    """
    for number, message in enumerate(messages):
        for text in texts_of(message) if message["role"] == "user" else ():
            if re.match(rf"(<{kind}>)+(\n|$)", text) or re.search(rf"\n(<{kind}>)+$", text):
                raise RowError(f"message {number} begins or ends with <{kind}>, and the row has no "
                               f"{NOUNS[kind]}", f"name it in the column {kind!r}, or remove that tag")


def text_parts(text: str) -> list[dict]:
    """A message's content that is one text."""
    return [{"type": "text", "text": text}]


def texts_of(message: dict) -> list[str]:
    """The texts of a message's parts."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def has_media(message: dict) -> bool:
    """Whether a message has a part that is not text."""
    return any(part["type"] != "text" for part in message["content"])

"""messages: a row of any data set as the one shape that the rest of the kit knows.

A message is {role, content}, its content a list of parts: {"type": "text", "text": …} or {"type": KIND}, with
image, audio or video for KIND. The media themselves stand beside the messages, in the order of their parts.

Fork me to: accept another shape of row (`normalise`).
"""
NOUNS = {"image": "picture", "audio": "sound", "video": "clip"}        # what a person calls a kind
MEDIA_COLUMNS = {"images": "image", "image": "image", "audios": "audio", "audio": "audio",
                 "videos": "video", "video": "video"}
PLACES = ("path", "url", "bytes")                    # keys under which a part may name its medium
ROLES = ("system", "user", "assistant", "tool")
WRITE = 'write {"role": …, "content": …}'


class RowError(ValueError):
    """A row that can't be used: RowError(reason, fix), both one line."""

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        # JSON can hold halves of surrogate pairs, which no file or terminal takes.
        self.reason, self.fix = (text.encode("utf-8", "backslashreplace").decode() for text in (reason, fix))


def normalise(row, field_messages: str | None = None) -> tuple[list[dict], list]:
    """(messages, media) of a row, the media as the row gives them. RowError where it can't be one.

    Media named in parts keep their place. Those of a column fill the bare parts of its kind, over all turns
    in order, or go before the first user text where the row has no such part. A column holds one medium, a
    list of them or none; a clip may itself be a list, of its frames.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, not {name_of(row)}", 'write {"messages": […]}')
    key = field_messages or "messages"
    if not isinstance(row.get(key), list) or not row[key]:
        keys = shortened(", ".join(map(str, row))) or "nothing"
        raise RowError(f"no list of messages under {key!r}; the row has {keys}",
                       "write the conversation there, or name its key with field_messages")
    if row.get("tools"):
        raise RowError("the row has tools, which aren't rendered yet", "remove the row, or its tools")
    messages = [message_of(message, number) for number, message in enumerate(row[key])]
    for kind in NOUNS:
        columns = [column for column, of_kind in MEDIA_COLUMNS.items() if of_kind == kind]
        fill(messages, kind, [medium for column in columns for medium in as_list(row.get(column))])
    media = [part for message in messages for part in message["content"] if part["type"] != "text"]
    return messages, [part.pop("source") for part in media]


def message_of(message, number: int) -> dict:
    """A message with typed content; media are still in their parts, under "source"."""
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {name_of(message)}, not an object", WRITE)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"message {number} has the role {shortened(repr(role))}",
                       f"use one of {', '.join(ROLES)}")
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, [], {}):
            raise RowError(f"message {number} ({role}) has {shortened(repr(key))}, which isn't rendered yet",
                           "remove that key, or put its text into the content")
    if isinstance(content, str):
        content = text_parts(content)
    if not isinstance(content, list):
        raise RowError(f"message {number} ({role}) has no content", "write a text or a list of typed parts")
    message = {"role": role, "content": [part_of(part, number) for part in content]}
    if any("\ud800" <= character <= "\udfff" for text in texts_of(message) for character in text):
        raise RowError(f"message {number} ({role}) holds half a surrogate pair, which is no character",
                       "write that character whole, or remove it")
    return message


def part_of(part, number: int) -> dict:
    """A part of a message's content; a medium's has "source", None where a column is to fill it."""
    kind = part.get("type") if isinstance(part, dict) else name_of(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RowError(f"message {number} has a text part without a text",
                           'write {"type": "text", "text": …}')
        return {"type": "text", "text": part["text"]}
    if isinstance(kind, str) and kind in NOUNS:
        source = next((part[key] for key in (kind, *PLACES) if part.get(key) is not None), None)
        if isinstance(part.get("base64"), str):
            source = f"data:;base64,{part['base64']}"
        if part.get("array") is not None:
            source = {key: part[key] for key in ("array", "sampling_rate") if key in part}
        return {"type": kind, "source": source}
    raise RowError(f"message {number} has a part of type {shortened(repr(kind))}",
                   f"use text, {', '.join(NOUNS)}")


def as_list(value) -> list:
    """A media column's value as a list: one medium, several, none or null."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def fill(messages: list[dict], kind: str, listed: list) -> None:
    """Nothing; every part of this kind has its source."""
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    bare = [part for part in parts if part["source"] is None]
    if listed and not parts:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise RowError(f"{count(len(listed), NOUNS[kind])}, but no user message to stand in",
                           "add a user message")
        place = next((n for n, part in enumerate(first["content"]) if part["type"] == "text"), 0)
        first["content"][place:place] = parts = [{"type": kind, "source": medium} for medium in listed]
    elif len(bare) != len(listed):
        raise RowError(f"{count(len(bare), f'{kind} placeholder')}, but "
                       f"{count(len(listed), f'listed {NOUNS[kind]}')}",
                       f'write one {{"type": "{kind}"}} part for each entry of the {kind} column')
    else:
        for part, medium in zip(bare, listed):
            part["source"] = medium
    for number, message in enumerate(messages):
        if parts and any(f"<{kind}>" in text for text in texts_of(message)):
            raise RowError(f"message {number} has <{kind}> in its text, which is only characters here",
                           f'write a part {{"type": "{kind}"}} in its place')


def text_parts(text: str) -> list[dict]:
    """A message's content that is one text."""
    return [{"type": "text", "text": text}]


def texts_of(message: dict) -> list[str]:
    """The texts of a message's parts."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def has_media(message: dict) -> bool:
    """Whether a message has a part that is not text."""
    return any(part["type"] != "text" for part in message["content"])


def count(number: int, word: str) -> str:
    """A number with its noun: "1 picture", "2 pictures"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def name_of(value) -> str:
    """What a JSON value is, as in "a list"."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shortened(text: str) -> str:
    """At most 80 characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"

"""One data set with a row of every kind that can't be used: each is listed with its reason and its fix, in one run."""

import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests import test_data, test_sources
from tests.test_data import ANSWER, CHAT, QUESTION, TYPED, kit  # noqa: F401 - a fixture

SAY = "write what the assistant should answer, or remove the row"
PICTURE = "replace that picture, or remove the row"
WRITE = 'write {"role": …, "content": …}'
TYPES = "use text, image, audio, video"
NAME = "write the conversation there, or name its key with field_messages"
PARTS = 'write one {"type": "image"} part for each entry of the image column'
BESIDE = 'write a part {"type": "image"} in its place, or a <image> for each entry of the image column'
TOKEN = 'remove it; a picture is a part {"type": "image"}, not a token in a text'
TOOLS = 'write [{"type": "function", "function": {"name": …, "parameters": …}}]'
CALLS = 'write [{"type": "function", "function": {"name": …, "arguments": {…}}}]'
FLAG = "write true or false there, or name another key in message_field_training"
ROLES = "use one of system, user, assistant, tool, or name its meaning under roles"


def png(size=(8, 8), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A picture that says it has 144 million pixels, and holds none."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def user(content, **keys) -> dict:
    """A row of this question and an answer."""
    return {"messages": [{"role": "user", "content": content, **keys}, ANSWER]}


def said(**keys) -> dict:
    """A row in which the assistant's message has these keys."""
    return {"messages": [QUESTION, {"role": "assistant", **keys}]}


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# What somebody gave, as a row or as the bytes of a line: the reason and the fix.
ROWS = {
    "a number": (3, "a row must be an object, not a number", 'write {"messages": […]}'),
    "a list": ([CHAT], "a row must be an object, not a list", 'write {"messages": […]}'),
    "null": (None, "a row must be an object, not null", 'write {"messages": […]}'),
    "a line that is cut": (b'{"messages": [{"role"', "not JSON: Expecting ':' delimiter at column 22", "mend or remove that line"),
    "a line in another encoding": (b'{"messages": "\xe4"}', "not JSON: the text is not UTF-8", "mend or remove that line"),
    "brackets without end": (b"[" * 100_000, "not JSON: …", "mend or remove that line"),
    "an empty object": ({}, "no list of messages under 'messages'; the row has nothing", NAME),
    "another column": ({"text": "hi"}, "no list of messages under 'messages'; the row has text", NAME),
    "messages that are text": ({"messages": "hi"}, "the conversation is the text 'hi', which is no JSON of messages",
                               'write it as json.dumps does: [{"role": …, "content": …}]'),
    "messages as Python prints them": ({"messages": str(CHAT["messages"])}, "the conversation is the text …, which is no JSON of messages",
                                       'write it as json.dumps does: [{"role": …, "content": …}]'),
    "no message": ({"messages": []}, "no list of messages under 'messages'; the row has messages", NAME),
    "a message that is text": ({"messages": ["hi"]}, "message 0 is a text, not an object", WRITE),
    "a role that is none": ({"messages": [{"role": "bot", "content": "hi"}]}, "message 0 has the role 'bot'", ROLES),
    "no role": ({"messages": [{"content": "hi"}]}, "message 0 has the role None", ROLES),
    "a role that is a list": ({"messages": [{"role": [], "content": "hi"}]}, "message 0 has the role []", ROLES),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 (user) has no content", "write a text or a list of typed parts"),
    "content that is a number": (user(3), "message 0 (user) has no content", "write a text or a list of typed parts"),
    "a part that is text": (user(["hi"]), "message 0 has a part of type 'a text'", TYPES),
    "a part of no kind": (user([{"type": "smell"}]), "message 0 has a part of type 'smell'", TYPES),
    "a text part without text": (user([{"type": "text"}]), "message 0 has a text part without a text",
                                 'write {"type": "text", "text": …}'),
    "a key that isn't rendered": (user("hi", mood="good"), "message 0 (user) has 'mood', which isn't rendered",
                                  "remove that key, or say in message_property_mappings what it holds"),
    "a weight": (said(content="hi", weight=1), "message 1 (assistant) has 'weight', which isn't rendered",
                 "write message_field_training: weight into the recipe"),
    "a part's own resolution": (user([{"type": "image", "path": "red.png", "max_pixels": 9}]),
                                "message 0 has 'max_pixels' in a part of type 'image', which isn't read",
                                "remove that key; image_max_pixels is for all"),
    "a part's own rate": (user([{"type": "video", "video": ["red.png"], "fps": 1.0}]),
                          "message 0 has 'fps' in a part of type 'video', which isn't read",
                          "remove that key; video_fps is for all"),
    "a small one of OpenAI's": (user([{"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}}]),
                                "message 0 has 'detail' in a part of type 'image', which isn't read",
                                "remove that key; image_max_pixels is for all"),
    "a clip's resolution": (user([{"type": "video", "video": ["red.png"], "max_pixels": 9}]),
                            "message 0 has 'max_pixels' in a part of type 'video', which isn't read", "remove that key"),
    "an index twice": (user([{"type": "image", "index": 0}] * 2) | {"images": ["red.png", "green.png"]},
                       "the image parts have the indices [0, 0], for 2 listed pictures",
                       "name each entry of the image column once, from 0, or remove every index"),
    "half a character": (user("\ud83d"), "message 0 (user) holds half a surrogate pair, which is no character",
                         "write that character whole, or remove it"),
    "train that is text": (said(content="hi", train="no"), "message 1 (assistant) has train: 'no'", FLAG),
    "calls of a user": (user("hi", tool_calls=[{"name": "f"}]), "message 0 (user) has tool_calls, which only an assistant has",
                        "remove that key"),
    "thoughts of a user": (user("hi", reasoning_content="hm"), "message 0 (user) has reasoning_content, which only an "
                           "assistant has", "remove that key"),
    "calls that are broken JSON": (said(tool_calls="[{"), "message 1 has tool_calls that are no list of calls, each with a name", CALLS),
    "a call without a name": (said(tool_calls=[{"function": {}}]), "message 1 has tool_calls that are no list of calls, each with a name",
                              CALLS),
    "a thought that is a list": (said(content="hi", reasoning_content=["hm"]),
                                 "message 1 (assistant) has a reasoning_content that is a list", "write it as a text"),
    "tools that are none": (CHAT | {"tools": "{"}, "'tools' is no list of tools, each with a name", TOOLS),
    "a tool without a name": (CHAT | {"tools": [{}]}, "'tools' is no list of tools, each with a name", TOOLS),
    "tools that the template drops": (CHAT | {"tools": [{"name": "look"}]},
                                      "the chat template drops or changes this text: 'look'",
                                      "name a chat_template that renders every message as it stands"),
    "calls that the template drops": (said(content="hi", tool_calls=[{"name": "look"}]),
                                      "the chat template drops or changes this text: 'look'",
                                      "name a chat_template that renders every message as it stands"),
    "a thought that the template drops": (said(content="hi", reasoning_content="hm"),
                                          "the chat template drops or changes this text: 'hm'",
                                          "name a chat_template that renders every message as it stands"),
    "a completion that is a number": ({"prompt": "a", "completion": 3},
                                      "'completion' is a number, neither a text nor a list of messages",
                                      "write prompt and completion as texts or as lists of messages"),
    "several answers": ({"question": "a", "answer": ["b", "c"]},
                        "'answer' is a list, neither a text nor a list of messages",
                        "write question and answer as texts or as lists of messages"),
    "no answer": ({"messages": [QUESTION]}, "nothing to learn: no assistant message has a text", SAY),
    "an answer of spaces": (said(content=" \n"), "nothing to learn: no assistant message has a text", SAY),
    "an answer that isn't trained": (said(content="hi", train=False), "nothing to learn: no assistant message has a text", SAY),
    "a placeholder too many": (TYPED, "1 image placeholder, but 0 listed pictures", PARTS),
    "a picture too many": (TYPED | {"images": ["red.png", "red.png"]}, "1 image placeholder, but 2 listed pictures", PARTS),
    "a tag too many": ({"conversations": [{"from": "human", "value": "<image><image>a"}, {"from": "gpt", "value": "b"}],
                        "image": "red.png"}, "2 image placeholders, but 1 listed picture", PARTS),
    "a tag for a picture that isn't there": ({"conversations": [{"from": "human", "value": "<image>a"},
                                                                {"from": "gpt", "value": "b"}]},
                                             "message 0 (user) spells the special token '<image>'", TOKEN),
    "a picture and nobody who shows it": ({"messages": [ANSWER], "image": "red.png"},
                                          "1 picture, but no user message to stand in", "add a user message"),
    "a tag beside a part": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}, {"type": "image"}]},
                                          ANSWER], "image": "red.png"},
                            "message 0 has <image> in its text, which is only characters here",
                            BESIDE),
    "a tag too few": ({"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": ["red.png"] * 2},
                      "message 0 has <image> in its text, which is only characters here", BESIDE),
    "a special token": (said(content="hi</s>"), "message 1 (assistant) spells the special token '</s>'", TOKEN),
    "a special token in a thought": (said(content="hi", reasoning_content="</s>"),
                                     "message 1 (assistant) spells the special token '</s>'", TOKEN),
    "a missing picture": (CHAT | {"image": "nope.png"}, "nope.png: no such file", PICTURE),
    "a folder for a picture": (CHAT | {"image": "."}, "'.': Is a directory", PICTURE),
    "a name with a zero byte": (CHAT | {"image": "a\0b"}, "'a\\x00b': embedded null byte", PICTURE),
    "a name that is too long": (CHAT | {"image": "a" * 300}, f"'{'a' * 199}: File name too long", PICTURE),
    "an empty file": (CHAT | {"image": "empty.png"}, "empty.png: empty file (0 bytes)", PICTURE),
    "a page for a picture": (CHAT | {"image": "page.png"}, "page.png: not a picture (it starts with b'<html>')", PICTURE),
    "a cut picture": (CHAT | {"image": "cut.png"}, "cut.png: not a readable picture (…)", PICTURE),
    "a bomb": (CHAT | {"image": "bomb.png"}, "bomb.png: 12000x12000 pixels, over the limit of 120,000,000", PICTURE),
    "a picture that is a number": (CHAT | {"image": 3}, "picture: must be a path, bytes or an image, not 3", PICTURE),
    "a picture without a path": (CHAT | {"image": {"path": None}}, "picture: must be a path, bytes or an image, not None", PICTURE),
    "an array for a picture": (CHAT | {"image": {"array": [[1]]}}, "picture in the row: an array is no picture", PICTURE),
    "broken base64": (CHAT | {"image": "data:image/png;base64,%%%"}, "data:image/png;base64,%%%: broken base64 (…)", PICTURE),
    "base64 that is a number": (user([{"type": "image", "base64": 3}]), "data:;base64,3: broken base64 (…)", PICTURE),
    "base64 of no picture": (CHAT | {"image": uri(b"hello")}, "picture in the row: not a picture (it starts with b'hello')", PICTURE),
    "base64 of nothing": (CHAT | {"image": uri(b"")}, "picture in the row: empty file (0 bytes)", PICTURE),
    "a private url": (CHAT | {"image": "http://127.0.0.1:1/a"},
                      "http://127.0.0.1:1/a: 127.0.0.1 is no public host; url_hosts can allow it", PICTURE),
    "a url of a file": (CHAT | {"image": "file:///no/such.png"}, "/no/such.png: no such file", PICTURE),
    "a sound for a model without ears": (CHAT | {"audio": {"array": [0.0] * 9, "sampling_rate": 16_000}},
                                         "message 0 (user) has a sound, and base_model takes none", "…"),
    "a sound without a rate": (CHAT | {"audio": {"array": [0.0]}}, "sound in the row: an array without sampling_rate",
                               "replace that sound, or remove the row"),
    "a clip without frames": (CHAT | {"videos": [[]]}, "clip: an empty list of frames",
                              "replace that clip, or remove the row"),
    "a clip of frames of two sizes": (CHAT | {"videos": [["red.png", "green.png"]]}, "clip in the row: not a readable clip (frames of several sizes)",
                                      "replace that clip, or remove the row"),
    "too many pictures": (CHAT | {"images": ["red.png"] * 4}, "4 pictures, over max_images 3",
                          "raise max_images, or remove some with their parts"),
    "too long": (user("why? " * 900), "… tokens, over sequence_len 512",
                 "sequence_len: 8192, or shorten the row"),
}


@pytest.fixture
def rejects(kit) -> dict[int, dict]:  # noqa: F811
    """{place of a kind: its reject} of a run on all of them, with a good row at the end."""
    files = {"empty.png": b"", "page.png": b"<html>", "cut.png": png((64, 64))[:60],
             "bomb.png": bomb()}
    for name, content in files.items():
        Path(name).write_bytes(content)
    given = [*(row for row, _, _ in ROWS.values()), CHAT]
    kit.configure("on_bad_row=skip", "max_images=3", "sequence_len=512", "url_retries=0")
    Path("data.jsonl").write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in given))
    kit.script("02_data").main(["run"])
    assert [sample["row"] for sample in kit.samples()] == [len(ROWS)]
    assert kit.counts()["rejected_rows"] == len(ROWS)
    return {reject["row"]: reject for reject in kit.rejects()}


def test_every_kind_of_bad_row_is_listed_with_its_line_reason_and_fix(rejects):
    wrong = []
    for place, (name, (_, reason, fix)) in enumerate(ROWS.items()):
        found = rejects[place]
        assert found["where"] == f"data.jsonl:{place + 1}"
        for expected, words in ((reason, found["reason"]), (fix, found["fix"])):
            if not re.fullmatch(re.escape(expected).replace("…", "[^\n]*"), words):
                wrong.append((name, words, expected))
    assert wrong == []


def test_the_tables_of_bad_rows_media_and_data_sets_hold_sixty_kinds_and_more():
    assert len(ROWS) + len(test_data.CASES) + len(test_sources.BAD) >= 60

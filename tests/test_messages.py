"""A row of any shape becomes messages with their pictures, or a RowError that says what is wrong with it."""

import json
import random

import pytest
from PIL import Image

from lib.messages import RowError, normalise

PNG = b"bytes of a picture"
QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "red"}
CHAT = [QUESTION, ANSWER]
TYPED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ANSWER]


def kinds(messages: list[dict]) -> list[list[str]]:
    """The types of each message's parts."""
    return [[part["type"] for part in message["content"]] for message in messages]


@pytest.mark.parametrize("row, pictures", [
    ({}, []),
    ({"images": None}, []),
    ({"images": []}, []),
    ({"image": None, "images": []}, []),
    ({"image": "a.png"}, ["a.png"]),
    ({"images": "a.png"}, ["a.png"]),
    ({"images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
    ({"image": {"bytes": PNG, "path": None}}, [{"bytes": PNG, "path": None}]),
    ({"images": [{"bytes": None, "path": "a.png"}]}, [{"bytes": None, "path": "a.png"}]),
])
def test_an_image_column_holds_one_picture_several_none_or_null(row, pictures):
    messages, found = normalise({"messages": CHAT} | row)
    assert found == pictures
    assert kinds(messages)[0] == ["image"] * len(pictures) + ["text"]


def test_a_pil_image_is_a_picture():
    image = Image.new("RGB", (1, 1))
    assert normalise({"messages": CHAT, "image": image})[1] == [image]


def test_listed_pictures_go_before_the_first_user_text_where_no_placeholder_is():
    row = {"messages": [{"role": "system", "content": "a"}, *CHAT], "images": ["a.png", "b.png"]}
    assert kinds(normalise(row)[0]) == [["text"], ["image", "image", "text"], ["text"]]


def test_listed_pictures_fill_the_placeholders_of_all_turns_in_order():
    inline = [{"type": "image", "path": "b.png", "text": None}, {"type": "image"}]
    row = {"messages": [*TYPED, {"role": "user", "content": inline}], "images": ["a.png", "c.png"]}
    messages, pictures = normalise(row)
    assert pictures == ["a.png", "b.png", "c.png"]
    assert messages[2]["content"] == [{"type": "image"}, {"type": "image"}]


@pytest.mark.parametrize("part, source", [
    ({"path": "a.png"}, "a.png"), ({"image": "a.png"}, "a.png"), ({"url": "a.png"}, "a.png"),
    ({"bytes": PNG}, PNG), ({"base64": "aGk="}, "data:;base64,aGk="),
])
def test_a_part_names_its_picture_in_any_usual_way(part, source):
    row = {"messages": [{"role": "user", "content": [{"type": "image", **part}]}, ANSWER]}
    assert normalise(row)[1] == [source]


def test_another_column_may_hold_the_conversation():
    assert normalise({"chat": CHAT}, "chat") == normalise({"messages": CHAT})


def test_a_null_key_of_a_message_is_no_key():  # a Parquet file gives every message the keys of all
    with_null = [message | {"name": None} for message in CHAT]
    assert normalise({"messages": with_null}) == normalise({"messages": CHAT})


def one(role: str = "user", **keys) -> dict:
    """A row of one message."""
    return {"messages": [{"role": role, **keys}]}


@pytest.mark.parametrize("row, reason", [
    (3, "a row must be an object, not a number"),
    ({"text": "a"}, "no list of messages under 'messages'; the row has text"),
    ({"messages": []}, "no list of messages under 'messages'; the row has messages"),
    ({"messages": ["hi"]}, "message 0 is a text, not an object"),
    ({"messages": [{"from": "human", "value": "hi"}]}, "message 0 has the role None"),
    (one("bot", content="hi"), "message 0 has the role 'bot'"),
    (one(), "message 0 (user) has no content"),
    (one(content=[{"type": "text"}]), "message 0 has a text part without a text"),
    (one(content=[{"type": "video"}]), "message 0 has a part of type 'video'"),
    (one(content=["hi"]), "message 0 has a part of type 'a text'"),
    (one(content="\ud83d hi"), "message 0 (user) holds half a surrogate pair, which is no character"),
    (one(content="a", tool_calls=[{}]), "message 0 (user) has 'tool_calls', which isn't rendered yet"),
    (one(content="a", train=False), "message 0 (user) has 'train', which isn't rendered yet"),
    ({"messages": CHAT, "tools": [{}]}, "the row has tools, which aren't rendered yet"),
    ({"messages": TYPED}, "1 image placeholder, but 0 listed pictures"),
    ({"messages": TYPED, "images": ["a.png", "b.png"]}, "1 image placeholder, but 2 listed pictures"),
    ({"messages": [ANSWER], "image": "a.png"}, "1 picture, but no user message to stand in"),
])
def test_a_row_that_is_no_conversation_is_rejected_with_the_reason(row, reason):
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert caught.value.reason == reason and caught.value.fix


# ---- any JSON value ----

PLAIN = [None, True, 0, -1.5, "", "hi", "\ud800", "a.png", "user", "assistant", "image", "text", "<image>"]
KEYS = ["messages", "role", "content", "type", "text", "image", "images", "path", "bytes", "base64", "tools"]
KEYS += ["", "\udfff"]


def anything(choose: random.Random, depth: int = 0):
    """A random JSON value, often with the keys and words that rows have."""
    if depth > 4 or choose.random() < 0.3:
        return choose.choice(PLAIN)
    if choose.random() < 0.5:
        return [anything(choose, depth + 1) for _ in range(choose.randrange(4))]
    return {key: anything(choose, depth + 1) for key in choose.sample(KEYS, choose.randrange(6))}


def conversation(choose: random.Random) -> dict:
    """A row in which anything may be wrong, or nothing."""
    def some(make) -> list:
        return [make() for _ in range(choose.randrange(4))]

    def part():
        picture = {"type": "image"} | choose.choice([{}, {"path": "a.png"}])
        return choose.choice([picture, {"type": "text", "text": "hi"}, anything(choose, 3)])

    def message():
        content = choose.choice(["hi", some(part), anything(choose, 3)])
        typical = {"role": choose.choice(["user", "assistant", "system"]), "content": content}
        return choose.choice([typical, typical, anything(choose, 2)])

    return {"messages": some(message), "images": choose.choice([[], ["a.png"], anything(choose, 3)])}


def test_any_json_value_is_a_row_or_a_row_error():
    choose, kept = random.Random(7), 0
    for number in range(20_000):
        row = conversation(choose) if number % 2 else anything(choose)
        try:
            messages, pictures = normalise(json.loads(json.dumps(row)))
        except RowError as error:
            said = error.reason + error.fix
            assert "\n" not in said and said.encode("utf-8")
            continue
        kept += 1
        parts = [part for message in messages for part in message["content"]]
        assert len(pictures) == sum(part == {"type": "image"} for part in parts)
        assert all(part == {"type": "image"} or part.keys() == {"type", "text"} for part in parts)
    assert kept > 500  # it isn't all garbage

"""A row of any shape becomes messages with their media, or a RowError that says what is wrong with it."""

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


SOUND = {"array": [0.0, 0.5], "sampling_rate": 16_000}


@pytest.mark.parametrize("part, source", [
    ({"type": "audio", "audio": "a.wav"}, "a.wav"), ({"type": "audio", "path": "a.wav"}, "a.wav"),
    ({"type": "audio", **SOUND}, SOUND), ({"type": "audio", "audio": SOUND}, SOUND),
    ({"type": "audio", "base64": "aGk="}, "data:;base64,aGk="), ({"type": "video", "video": ["a.png", "b.png"]}, ["a.png", "b.png"]),
    ({"type": "video", "url": "a.mp4"}, "a.mp4"), ({"type": "video", "array": [[1]]}, {"array": [[1]]}),
])
def test_a_part_names_its_sound_or_clip_in_any_usual_way(part, source):
    messages, found = normalise({"messages": [{"role": "user", "content": [part]}, ANSWER]})
    assert found == [source] and messages[0]["content"] == [{"type": part["type"]}]


@pytest.mark.parametrize("row, media", [
    ({"audio": "a.wav"}, ["a.wav"]), ({"audios": ["a.wav", "b.wav"]}, ["a.wav", "b.wav"]), ({"audio": SOUND}, [SOUND]),
    ({"video": "a.mp4"}, ["a.mp4"]), ({"videos": [["1.png", "2.png"], "b.mp4"]}, [["1.png", "2.png"], "b.mp4"]),
    ({"video": None, "audios": [], "images": "a.png"}, ["a.png"]),
    ({"videos": "a.mp4", "audio": "a.wav", "image": "a.png"}, ["a.png", "a.wav", "a.mp4"]),
])
def test_a_column_of_sounds_or_clips_holds_one_several_none_or_null(row, media):
    messages, found = normalise({"messages": CHAT} | row)
    assert found == media and kinds(messages)[0][-1] == "text" and len(kinds(messages)[0]) == len(media) + 1


def test_each_kind_fills_its_own_placeholders_and_all_media_come_in_the_order_of_their_parts():
    content = [{"type": "video"}, {"type": "image"}, {"type": "audio"}, {"type": "text", "text": "a"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "audio": "a.wav", "videos": ["v.mp4"], "images": [1, 2]}
    assert normalise(row)[1] == ["v.mp4", 1, "a.wav", 2]


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
    (one(content=[{"type": "smell"}]), "message 0 has a part of type 'smell'"),
    (one(content=[{"type": "video"}]), "1 video placeholder, but 0 listed clips"),
    ({"messages": CHAT + one(content=[{"type": "audio"}] * 2)["messages"], "audio": "a.wav"},
     "2 audio placeholders, but 1 listed sound"),
    ({"messages": one(content=[{"type": "text", "text": "<audio> hi"}, {"type": "audio"}])["messages"], "audio": "a.wav"},
     "message 0 has <audio> in its text, which is only characters here"),
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

MEDIA = ("image", "audio", "video")
PLAIN = [None, True, 0, -1.5, "", "hi", "\ud800", "a.png", "user", "assistant", "image", "text", "<image>"]
KEYS = ["messages", "role", "content", "type", "text", "image", "images", "audio", "videos", "path", "bytes",
        "array", "base64", "tools"]
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
        medium = {"type": choose.choice(MEDIA)} | choose.choice([{}, {"path": "a.png"}])
        return choose.choice([medium, {"type": "text", "text": "hi"}, anything(choose, 3)])

    def message():
        content = choose.choice(["hi", some(part), anything(choose, 3)])
        typical = {"role": choose.choice(["user", "assistant", "system"]), "content": content}
        return choose.choice([typical, typical, anything(choose, 2)])

    column = choose.choice([f"{kind}{plural}" for kind in MEDIA for plural in ("", "s")])
    return {"messages": some(message), column: choose.choice([[], ["a.png"], anything(choose, 3)])}


def test_any_json_value_is_a_row_or_a_row_error():
    choose, kept = random.Random(7), 0
    for number in range(20_000):
        row = conversation(choose) if number % 2 else anything(choose)
        try:
            messages, media = normalise(json.loads(json.dumps(row)))
        except RowError as error:
            said = error.reason + error.fix
            assert "\n" not in said and said.encode("utf-8")
            continue
        kept += 1
        parts = [part for message in messages for part in message["content"]]
        assert len(media) == sum(part in [{"type": kind} for kind in MEDIA] for part in parts)
        assert all(part.keys() == ({"type"} if part["type"] in MEDIA else {"type", "text"}) for part in parts)
    assert kept > 500  # it isn't all garbage

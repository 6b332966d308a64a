"""A row of any shape becomes messages with their media, or a RowError that says what is wrong with it."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.data.messages import normalise
from lib.data.shapes import Shape, tools_of
from lib.run.errors import RowError

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


URI = "data:image/png;base64,aGk="


@pytest.mark.parametrize("part, kind, source", [
    *[({"type": "image_url", "image_url": {"url": url}}, "image", url)
      for url in ("https://a.b/c.png", URI, "file:///c.png", "c.png")],
    ({"type": "image_url", "image_url": "https://a.b/c.png"}, "image", "https://a.b/c.png"),
    ({"type": "image_url", "image_url": {"url": URI, "detail": "auto"}}, "image", URI),
    ({"type": "image_url", "image_url": {"url": URI, "detail": "high"}, "text": None, "url": None}, "image", URI),
    ({"type": "image_url", "image_url": {"url": URI, "detail": None}, "input_audio": None}, "image", URI),
    ({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}}, "audio", "data:;base64,aGk="),
    ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "audio", "a.wav"),
    ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "video", "a.mp4"),
])
def test_openais_parts_are_read(part, kind, source):
    messages, media = normalise({"messages": [{"role": "user", "content": [part]}, ANSWER]})
    assert media == [source] and messages[0]["content"] == [{"type": kind}]


def test_an_index_says_which_entry_of_the_column_a_part_shows():
    text = {"type": "text", "text": "a", "index": None}
    content = [{"type": "image", "index": 1, "text": None}, text, {"type": "image", "index": 0, "text": ""}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "b.png"]}
    messages, pictures = normalise(row)
    assert pictures == ["b.png", "a.png"] and kinds(messages)[0] == ["image", "text", "image"]


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
    assert normalise({"chat": CHAT}, Shape(field_messages="chat")) == normalise({"messages": CHAT})


def test_a_null_key_of_a_message_is_no_key():  # a Parquet file gives every message the keys of all
    with_null = [message | {"name": None} for message in CHAT]
    assert normalise({"messages": with_null}) == normalise({"messages": CHAT})


# ---- other shapes of rows ----

PLAIN_CHAT = normalise({"messages": CHAT})
SHARE = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


@pytest.mark.parametrize("row, shape", [
    ({"conversations": SHARE}, Shape()),
    ({"conversation": SHARE}, Shape()),
    ({"messages": SHARE}, Shape()),
    ({"question": "What is it?", "answer": "red"}, Shape()),
    ({"prompt": "What is it?", "completion": "red"}, Shape()),
    ({"turns": [{"by": "me", "says": "What is it?"}, {"by": "it", "says": "red"}]},
     Shape("turns", message_property_mappings={"role": "by", "content": "says"},
           roles={"user": ["me"], "assistant": "it"})),
    ({"turns": [{"by": "human", "says": "What is it?"}, {"by": "gpt", "says": "red"}]},
     Shape("turns", message_field_role="by", message_field_content="says")),
    ({"messages": [{"role": "gpt", "content": "What is it?"}, {"role": "human", "content": "red"}]},
     Shape(roles={"user": ["gpt"], "assistant": ["human"]})),
])
def test_a_row_of_any_usual_shape_is_the_same_conversation(row, shape):
    assert normalise(row, shape) == PLAIN_CHAT


def test_messages_of_a_prompt_are_not_trained_and_those_of_its_completion_are():
    earlier = [QUESTION, ANSWER, QUESTION]
    for row in ({"prompt": earlier, "completion": [ANSWER]}, {"prompt": earlier, "completion": "red"}):
        messages, _ = normalise(row)
        assert [message.get("train") for message in messages] == [False, False, False, None]


def test_llavas_tags_are_parts_in_their_places_and_the_newlines_that_set_them_off_are_gone():
    row = {"image": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "<image>\nWhat is\n<image>\non it? <video>"}, SHARE[1],
        {"from": "human", "value": "And?"}, SHARE[1]]}
    messages, media = normalise(row)
    assert media == ["a.png", "b.png"]
    image, text = {"type": "image"}, "What is\n"
    assert messages[0]["content"] == [image, {"type": "text", "text": text}, image,
                                      {"type": "text", "text": "\non it? <video>"}]
    assert kinds(messages)[1:] == [["text"]] * 3
    last = {"image": "a.png", "conversations": [{"from": "human", "value": "What?\n<image>"}, SHARE[1]]}
    assert normalise(last)[0][0]["content"] == [{"type": "text", "text": "What?"}, image]


def test_tags_in_messages_are_parts_where_they_are_as_many_as_their_columns_media():
    row = {"messages": [{"role": "user", "content": "<image>\nWhat is <video>?"}, ANSWER,
                        {"role": "user", "content": [{"type": "text", "text": "And?\n<image>"}]}, ANSWER],
           "images": ["a.png", "b.png"], "videos": ["v.mp4"]}
    messages, media = normalise(row)
    assert media == ["a.png", "v.mp4", "b.png"]
    assert kinds(messages) == [["image", "text", "video", "text"], ["text"], ["text", "image"], ["text"]]
    assert messages[0]["content"][1]["text"] == "What is " and messages[2]["content"][0]["text"] == "And?"
    asked = {"prompt": "<audio>What?", "completion": "red", "audio": "a.wav"}
    assert kinds(normalise(asked)[0])[0] == ["audio", "text"]


def test_a_tag_in_the_text_of_a_row_without_pictures_is_only_characters():
    row = {"conversations": [{"from": "human", "value": "Is <image> HTML?"}, SHARE[1]]}
    assert normalise(row)[0][0]["content"] == [{"type": "text", "text": "Is <image> HTML?"}]


@pytest.mark.parametrize("text", ["<image>\nWhat?", "<image><image>\nWhich?", "What?\n<image>", "<image>"])
def test_a_tag_set_off_from_the_text_of_a_row_without_pictures_is_a_reject(text):
    for row in ({"img": "a.png", "conversations": [{"from": "human", "value": text}, SHARE[1]]},
                {"images": [], "messages": [{"role": "user", "content": text}, ANSWER]}):
        with pytest.raises(RowError, match="begins or ends with <image>, and the row has no picture"):
            normalise(row)
    normalise({"messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": text}]})


@pytest.mark.parametrize("row, shape, system", [
    ({"messages": CHAT}, Shape(system_prompt="Be brief."), "Be brief."),
    ({"conversations": SHARE, "system": "Be kind."}, Shape(system_prompt="Be brief."), "Be kind."),
    ({"messages": [{"role": "system", "content": "Be rude."}, *CHAT]}, Shape(system_prompt="Be brief."), "Be rude."),
    ({"question": "What is it?", "answer": "red"}, Shape(system_prompt="Be brief."), "Be brief."),
    ({"messages": [{"role": "system", "content": "Be rude."}, *CHAT]},
     Shape(system_prompt="Be brief.", drop_system_message=True), "Be brief."),
    ({"conversations": SHARE, "system": "Be kind."}, Shape(system_prompt="Be brief.", drop_system_message=True), "Be brief."),
])
def test_a_system_message_is_the_rows_own_or_its_columns_or_the_recipes(row, shape, system):
    messages, _ = normalise(row, shape)
    assert messages == [{"role": "system", "content": [{"type": "text", "text": system}]}, *PLAIN_CHAT[0]]


def test_rows_go_without_their_system_message_where_the_recipe_drops_it():
    row = {"messages": [{"role": "system", "content": "Be rude."}, *CHAT]}
    assert normalise(row, Shape(drop_system_message=True)) == normalise({"messages": CHAT} | {"system": "x"}, Shape(
        drop_system_message=True)) == PLAIN_CHAT


def test_field_thinking_names_the_key_of_thoughts():
    row = {"messages": [QUESTION, ANSWER | {"thinking": "Hm."}]}
    assert normalise(row, Shape(field_thinking="thinking"))[0][1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize("weight, train", [(0, False), (1, True), (1.0, True), (False, False), (None, None)])
def test_openais_weight_says_what_is_trained_where_the_recipe_names_it(weight, train):
    row = {"messages": [QUESTION, ANSWER | {"weight": weight}]}
    message = normalise(row, Shape(message_field_training="weight"))[0][1]
    assert message.get("train") is train


def test_a_conversation_and_its_media_may_be_the_json_of_them():
    row = {"messages": TYPED, "images": ["a.png"]}
    assert normalise({key: json.dumps(value) for key, value in row.items()}) == normalise(row)
    text = {"prompt": json.dumps(CHAT), "completion": "[1]"}
    assert normalise(text)[0][0]["content"] == [{"type": "text", "text": json.dumps(CHAT)}]


def test_tool_calls_results_and_thoughts_stay_with_their_messages():
    text = {**CALL, "function": {"name": "look", "arguments": '{"at": "it"}'}}
    rows = [{"role": "assistant", "content": None, "tool_calls": [text], "reasoning_content": "Hm."},
            {"role": "tool", "content": "red", "tool_call_id": "1", "name": "look"}]
    messages, _ = normalise({"messages": [QUESTION, *rows, ANSWER]})
    assert messages[1] == {"role": "assistant", "content": [], "tool_calls": [CALL], "reasoning_content": "Hm."}
    assert messages[2] == {"role": "tool", "content": [{"type": "text", "text": "red"}], "tool_call_id": "1",
                           "name": "look"}
    mapped = Shape(message_property_mappings={"reasoning_content": "thought"}, message_field_training="learn")
    messages, _ = normalise({"messages": [QUESTION, {**ANSWER, "thought": "Hm.", "learn": False}]}, mapped)
    assert messages[1] == {**PLAIN_CHAT[0][1], "reasoning_content": "Hm.", "train": False}


@pytest.mark.parametrize("tools", [[CALL], [CALL["function"]], json.dumps([CALL])])
def test_tools_are_a_list_or_the_text_of_one(tools):
    assert tools_of({"tools": tools}) == (json.loads(tools) if isinstance(tools, str) else tools)
    assert tools_of({"t": tools}, Shape(field_tools="t")) and tools_of({"tools": None}) == []


@pytest.mark.parametrize("tools", ["{", 3, [3], [{}], {"name": "look"}, [{"function": {"name": 1}}]])
def test_tools_that_are_none_are_a_row_error(tools):
    with pytest.raises(RowError, match="'tools' is no list of tools, each with a name"):
        tools_of({"tools": tools})


def one(role: str = "user", **keys) -> dict:
    """A row of one message."""
    return {"messages": [{"role": role, **keys}]}


@pytest.mark.parametrize("row, reason", [
    (3, "a row must be an object, not a number"),
    ({"text": "a"}, "no list of messages under 'messages'; the row has text"),
    ({"messages": []}, "no list of messages under 'messages'; the row has messages"),
    ({"messages": ["hi"]}, "message 0 is a text, not an object"),
    ({"messages": [{"who": "human", "value": "hi"}]}, "message 0 has the role None"),
    ({"conversations": "hi"}, "the conversation is the text 'hi', which is no JSON of messages"),
    ({"messages": "[{'role': 'user'}]", "prompt": "a", "completion": "b"},
     "the conversation is the text \"[{'role': 'user'}]\", which is no JSON of messages"),
    ({"prompt": "hi"}, "no list of messages under 'messages'; the row has prompt"),
    ({"prompt": "hi", "completion": 3}, "'completion' is a number, neither a text nor a list of messages"),
    ({"question": "hi", "answer": ["a", "b"]}, "'answer' is a list, neither a text nor a list of messages"),
    ({"conversations": [{"from": "human", "value": "<image> hi"}], "image": ["a.png", "b.png"]},
     "1 image placeholder, but 2 listed pictures"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "message 0 has the role 'function_call'"),
    (one("bot", content="hi"), "message 0 has the role 'bot'"),
    (one(), "message 0 (user) has no content"),
    (one(content=[{"type": "text"}]), "message 0 has a text part without a text"),
    (one(content=[{"type": "text", "text": "a", "image": "a.png"}]),
     "message 0 has 'image' in a part of type 'text', which isn't read"),
    (one(content=[{"type": "image", "path": "a.png", "max_pixels": 9}]),
     "message 0 has 'max_pixels' in a part of type 'image', which isn't read"),
    (one(content=[{"type": "image", "path": "a.png", "index": 0}]),
     "message 0 has 'index' in a part of type 'image', which isn't read"),
    (one(content=[{"type": "video", "video": "a.mp4", "nframes": 8}]),
     "message 0 has 'nframes' in a part of type 'video', which isn't read"),
    (one(content=[{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}]),
     "message 0 has 'detail' in a part of type 'image', which isn't read"),
    (one(content=[{"type": "input_audio", "input_audio": {"id": "a"}}]),
     "message 0 has 'id' in a part of type 'audio', which isn't read"),
    *[({"messages": one(content=[{"type": "image", "index": index} for index in named])["messages"], "images": ["a", "b"]},
       f"the image parts have the indices {named}, for 2 listed pictures")
      for named in ([0, 0], [1, 2], [0, None], ["0", "1"], [[0], 1])],
    ({"messages": [{"role": "user", "content": "<image> or <image>?"}], "image": "a.png"},
     "message 0 has <image> in its text, which is only characters here"),
    (one(content=[{"type": "smell"}]), "message 0 has a part of type 'smell'"),
    (one(content=[{"type": "video"}]), "1 video placeholder, but 0 listed clips"),
    ({"messages": CHAT + one(content=[{"type": "audio"}] * 2)["messages"], "audio": "a.wav"},
     "2 audio placeholders, but 1 listed sound"),
    ({"messages": one(content=[{"type": "text", "text": "<audio> hi"}, {"type": "audio"}])["messages"], "audio": "a.wav"},
     "message 0 has <audio> in its text, which is only characters here"),
    (one(content=["hi"]), "message 0 has a part of type 'a text'"),
    (one(content="\ud83d hi"), "message 0 (user) holds half a surrogate pair, which is no character"),
    (one(content="a", tool_calls=[CALL]), "message 0 (user) has tool_calls, which only an assistant has"),
    (one("assistant", tool_calls=[{}]), "message 0 has tool_calls that are no list of calls, each with a name"),
    (one("assistant", tool_calls="{"), "message 0 has tool_calls that are no list of calls, each with a name"),
    (one("assistant", content="a", reasoning_content=["b"]),
     "message 0 (assistant) has a reasoning_content that is a list"),
    (one("tool", content="a", tool_call_id=7), "message 0 (tool) has a tool_call_id that is a number"),
    (one("assistant", tool_calls=[{"name": "\udfff"}]),
     "message 0 (assistant) holds half a surrogate pair, which is no character"),
    (one(content="a", train="no"), "message 0 (user) has train: 'no'"),
    (one(content="a", weight=0), "message 0 (user) has 'weight', which isn't rendered"),
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
        "array", "base64", "tools", "index", "image_url", "url", "input_audio", "data"]
KEYS += ["", "\udfff", "conversations", "from", "value", "prompt", "completion", "question", "answer", "system", "train",
         "tool_calls", "function", "name", "arguments", "reasoning_content", "tool_call_id"]


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
        if choose.random() < 0.2:
            typical = {"from": choose.choice(["human", "gpt"]), "value": choose.choice(["hi", "<image> hi", content])}
        elif choose.random() < 0.2:
            typical |= {choose.choice(KEYS): anything(choose, 2)}
        return choose.choice([typical, typical, anything(choose, 2)])

    column = choose.choice([f"{kind}{plural}" for kind in MEDIA for plural in ("", "s")])
    if choose.random() < 0.2:
        return {"prompt": choose.choice(["hi", some(message)]), "completion": choose.choice(["hi", some(message)])}
    return {choose.choice(["messages", "conversations"]): some(message), column: choose.choice([[], ["a.png"], anything(choose, 3)])}


SHAPES = [Shape(), Shape(system_prompt="hi"), Shape(message_property_mappings={"role": "type", "content": "text"}),
          Shape("content", roles={"user": ["", "hi"]}, field_tools="content", message_field_training="type")]


def is_kept(row, shape: Shape) -> bool:
    """Whether a row becomes messages, which are then whole; a RowError has to be one line each."""
    try:
        messages, media = normalise(row, shape)
        tools_of(row, shape)
    except RowError as error:
        said = error.reason + error.fix
        assert "\n" not in said and said.encode("utf-8")
        return False
    json.dumps(messages, ensure_ascii=False).encode("utf-8")
    parts = [part for message in messages for part in message["content"]]
    assert len(media) == sum(part in [{"type": kind} for kind in MEDIA] for part in parts)
    assert all(part.keys() == ({"type"} if part["type"] in MEDIA else {"type", "text"}) for part in parts)
    return True


def test_rows_in_which_anything_is_wrong_are_rows_or_row_errors():
    choose, kept = random.Random(7), 0
    for number in range(20_000):
        row = json.loads(json.dumps(conversation(choose) if number % 2 else anything(choose)))
        kept += is_kept(row, SHAPES[number % 3 and number % len(SHAPES)])
    assert kept > 500  # it isn't all garbage


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(PLAIN),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=5), max_leaves=20)


@settings(max_examples=1000, derandomize=True, deadline=None, database=None)
@given(JSON, st.sampled_from(SHAPES))
def test_any_json_value_is_a_row_or_a_row_error(row, shape):
    is_kept(row, shape)

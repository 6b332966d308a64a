"""Thirteen things that go wrong in Axolotl's path for pictures, and what happens here instead: one test each."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lib.collator import IGNORE_INDEX
from lib.data.messages import normalise
from lib.media.pictures import fitted
from lib.run.errors import RowError
from lib.text.template import Labels
from tests.test_data import ANSWER, CHAT, QUESTION, kit, read_jsonl  # noqa: F401 - a fixture
from tests.test_label_knobs import AGENT, agent
from tests.test_labels import PICTURE, chat, family, marked, picture, with_template  # noqa: F401 - fixtures

SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


def trained(row: dict) -> str:
    """What a row of preview.jsonl trains, as tokens."""
    return "".join(token for token, label in zip(row["tokens"], row["labels"]) if label != IGNORE_INDEX)


def test_1_a_row_with_an_empty_list_of_pictures_is_a_text_row_of_a_mixed_set(kit):  # noqa: F811
    kit.run(rows=[CHAT | {"images": ["red.png"]}, CHAT | {"images": []}])
    assert [len(sample["media"]) for sample in kit.samples()] == [1, 0]


def test_2_a_column_may_hold_one_picture_as_the_hub_stores_it(kit):  # noqa: F811
    columns = {"messages": [CHAT["messages"]], "image": ["red.png"]}
    features = datasets.Dataset.from_dict(columns).features | {"image": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk("saved")
    kit.run(datasets=[{"path": "saved"}])
    assert kit.samples()[0]["media_tokens"] == 16


def test_3_every_placeholder_of_a_turn_gets_its_picture():
    two = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}
    assert normalise({"messages": [two, ANSWER], "images": ["a", "b"]})[1] == ["a", "b"]
    with pytest.raises(RowError, match="2 image placeholders, but 1 listed picture"):
        normalise({"messages": [two, ANSWER], "images": ["a"]})


def test_4_pictures_go_to_the_turns_in_order(kit):  # noqa: F811
    kit.run(rows=[{"messages": [SEEN, ANSWER, SEEN, ANSWER], "images": ["red.png", "green.png"]}])
    (sample,) = kit.samples()
    assert [Path(medium["path"]).name for medium in sample["media"]] == ["red.png", "green.png"]
    assert sample["text"].split("</s>")[0].count("<image>") == sample["text"].split("</s>")[1].count("<image>") == 1


def test_5_a_picture_without_a_placeholder_comes_before_the_text():
    messages, _ = normalise(CHAT | {"image": "a"})
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]


def test_6_a_turn_of_tool_calls_without_content_is_kept_and_trained(with_template):  # noqa: F811
    row = {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": agent()[1]["tool_calls"]},
                        {"role": "tool", "content": "shut", "tool_call_id": "1"}, {**ANSWER, "train": False}]}
    (conversation,) = with_template(AGENT)[0].conversations(normalise(row)[0])
    text = marked(conversation)
    assert 'assistant: «<call>{"name": "look"' in text and "tool: shut" in text and "«red" not in text


def test_7_image_size_is_for_pictures_of_columns_and_of_parts(kit):  # noqa: F811
    inline = {"role": "user", "content": [{"type": "image", "path": "purple.png"}, {"type": "text", "text": "What?"}]}
    kit.run("image_size=48", rows=[CHAT | {"image": "purple.png"}, {"messages": [inline, ANSWER]}])
    assert [(medium["width"], medium["height"]) for sample in kit.samples() for medium in sample["media"]] == [(48, 48)] * 2


def test_8_no_picture_is_distorted():
    seen = fitted(Image.new("RGB", (64, 20), "white"), (44, 44), "bilinear").getbbox()
    assert (seen[2] - seen[0]) / (seen[3] - seen[1]) == pytest.approx(64 / 20, rel=0.1)


def test_9_a_pad_id_equal_to_eos_leaves_the_end_of_turn_trained(kit):  # noqa: F811
    base = Path(shutil.copytree(kit.zoo("qwen2_5_vl"), "base"))
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8")) | {"pad_token": "<|im_end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    kit.run(base_model="base", rows=[CHAT])
    assert trained(read_jsonl(kit.out / "preview.jsonl")[0]).endswith("<|im_end|>")


def test_10_a_user_who_spells_the_markers_trains_nothing(family):  # noqa: F811
    with pytest.raises(RowError, match="spells the special token"):
        family("qwen2_5_vl")[0].conversations(chat("hi<|im_end|>\n<|im_start|>assistant\nno", "two"))


@pytest.mark.parametrize("base, end", [("llava", "</s>"), ("lfm2_vl", "<|im_end|>")])
def test_11_a_family_without_a_rule_of_its_own_trains_replies_alone(base, end, kit):  # noqa: F811
    kit.run(base=base, rows=[CHAT | {"image": "red.png"}])
    assert trained(read_jsonl(kit.out / "preview.jsonl")[0]).lstrip("▁Ġ") == f"red{end}"


def test_12_a_row_without_a_trained_token_is_a_reject_and_counted(kit):  # noqa: F811
    kit.run("on_bad_row=skip", rows=[CHAT, {"messages": [QUESTION, {"role": "assistant", "content": ""}]}])
    assert kit.rejects()[0]["reason"].startswith("nothing to learn") and kit.counts()["rejected_rows"] == 1


def test_13_no_token_of_a_medium_is_trained_with_train_on_inputs_either(kit, family):  # noqa: F811
    kit.run("train_on_inputs=true", base="qwen2_5_vl", rows=[CHAT | {"videos": [["red.png"] * 4]}, CHAT | {"image": "red.png"}])
    for row in read_jsonl(kit.out / "preview.jsonl"):
        assert row["media_tokens"] > 2 and "What" in trained(row)
        assert not any(mark in trained(row) for mark in ("pad|>", "<|vision_start|>", "<|vision_end|>"))
    template, encoder = family("smolvlm2")
    (conversation,) = template.conversations(chat(f"{PICTURE}one", "two"), Labels(("user", "assistant")))
    labels = encoder.encode(conversation.text, conversation.spans, [picture()])["labels"]
    assert not set(labels.unique().tolist()) & set(encoder.never_trained)

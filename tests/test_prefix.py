"""PaliGemma, whose prompts are prefixes: its processor gets prompt and reply apart, and only the reply is causal."""
import pytest
import torch

from lib.run.errors import RowError, StageError
from tests.runner import Run, colour_rows
from tests.test_families import find, inputs, picture, text

ASKED, SAID = "What is it?", "a red fox"


@pytest.fixture
def subject(tmp_path_factory):
    return find("paligemma", tmp_path_factory)


def test_tensors_and_labels_are_those_of_the_published_processor(subject):
    (row,) = subject.rows((2, ASKED, SAID))
    published = subject.processor(text=[f"<image><image>{ASKED}"], suffix=[SAID], images=[[picture(0), picture(1)]],
                                  return_tensors="pt")
    assert row.keys() == published.keys()
    assert all(torch.equal(row[key], value.to(row[key].dtype)) for key, value in published.items())
    assert subject.trained_text(row) == f"{SAID}<eos>"


def test_a_question_alone_is_what_serving_asks(subject):
    asked = subject.encoder.encode(f"<image>{ASKED}", [], [picture(0)])
    message = {"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": ASKED}]}
    served = subject.processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt",
                                                   add_generation_prompt=True)
    assert torch.equal(asked["input_ids"], served["input_ids"]) and not asked["token_type_ids"].any()


def test_a_prompt_sees_all_of_itself_and_nothing_of_the_reply(subject):
    def states(question, answer):
        (row,) = subject.rows((1, question, answer))
        with torch.no_grad():
            return subject.base.model(**inputs(subject.batch([row]))).last_hidden_state[0]
    first, other_prompt, other_reply = states(ASKED, SAID), states("What is it!", SAID), states(ASKED, "a red cat")
    prompt = len(subject.rows((1, ASKED, SAID))[0]["token_type_ids"][0].eq(0).nonzero())
    assert (first[0] - other_prompt[0]).abs().max() > 1e-4         # its first token sees its last
    torch.testing.assert_close(other_reply[:prompt], first[:prompt], rtol=1e-4, atol=1e-5)


def test_what_was_said_before_is_part_of_the_prompt(subject):
    first, second = subject.template.conversations(subject.conversation((1, "One?", "yes"), (1, "Two?", "no")))[::-1]
    texts = {"<image>One?yes<eos>", "<image><image>One?\nyes\nTwo?no<eos>"}
    assert {first.text, second.text} == texts
    for sample in (first, second):
        (span,) = sample.spans
        assert sample.text[slice(*span)] in ("yes<eos>", "no<eos>") and span[0] == sample.reply[0]


def test_a_row_without_a_picture_is_refused(subject):
    messages = [{"role": role, "content": [text(words)]} for role, words in (("user", ASKED), ("assistant", SAID))]
    (sample,) = subject.template.conversations(messages)
    with pytest.raises(RowError, match="has no picture, and base_model's processor takes no text alone"):
        subject.encoder.encode(sample.text, sample.spans, [])


@pytest.mark.parametrize("knobs", [{"train_on_inputs": True}, {"roles_to_train": ["user", "assistant"]}])
def test_a_prompt_is_not_trained(knobs, tmp_path, monkeypatch, subject):
    run = Run(tmp_path, monkeypatch, subject.folder, colour_rows(4), val_set_size=0, **knobs)
    with pytest.raises(StageError, match="rows.jsonl:1: a prompt can't be trained"):
        run.upto("02_data")

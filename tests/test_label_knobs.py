"""train_on_inputs, roles_to_train, train_on_eos and a message's own `train` choose exactly what they say.

Expected texts are written by hand with «» around what is trained, for templates of different structure: turns
that all end alike (ChatML), a system text inside the first question (Gemma), users' turns without an end
(Vicuna), the next header for an end, and none.
"""

import pytest

from lib.run.errors import RowError
from lib.text.template import Labels
from tests.test_labels import (  # noqa: F401 - fixtures
    LOOP, PROMPT, STRINGS, TEMPLATES, chat, expected_tokens, family, marked, with_template)

TALK = chat("one", "two", "three", "four", system="Be brief.")
EVERYONE = ("system", "user", "assistant", "tool")
CHATML = "<|im_start|>system\n{}<|im_end|>{}\n<|im_start|>user\n{}<|im_end|>{}\n<|im_start|>assistant\n{}<|im_end|>{}\n" \
    "<|im_start|>user\n{}<|im_end|>{}\n<|im_start|>assistant\n{}<|im_end|>{}\n"
GEMMA = "<bos><start_of_turn>user\n{}\n\n{}<end_of_turn>{}\n<start_of_turn>model\n{}<end_of_turn>{}\n" \
    "<start_of_turn>user\n{}<end_of_turn>{}\n<start_of_turn>model\n{}<end_of_turn>{}\n"

# (template, knobs): the whole sample
WANTED = {
    ("qwen2_5_vl", (EVERYONE, "turn")):
        CHATML.format("«Be brief.", "»", "«one", "»", "«two", "»", "«three", "»", "«four", "»"),
    ("qwen2_5_vl", (("assistant",), "none")):
        CHATML.format("Be brief.", "", "one", "", "«two»", "", "three", "", "«four»", ""),
    ("qwen2_5_vl", (("user",), "turn")):
        CHATML.format("Be brief.", "", "«one", "»", "two", "", "«three", "»", "four", ""),
    ("qwen2_5_vl", (("assistant",), "last")):
        CHATML.format("Be brief.", "", "one", "", "«two»", "", "three", "", "«four", "»"),
    ("gemma3", (EVERYONE, "turn")): GEMMA.format("«Be brief.»", "«one", "»", "«two", "»", "«three", "»", "«four", "»"),
    ("gemma3", (("system", "assistant"), "none")):
        GEMMA.format("«Be brief.»", "one", "", "«two»", "", "three", "", "«four»", ""),
    ("gemma3", (("user",), "last")): GEMMA.format("Be brief.", "«one»", "", "two", "", "«three»", "", "four", "")[:-1]
        .replace("four<end_of_turn>", "four«<end_of_turn>»") + "\n",
    ("llava", (("user", "assistant"), "turn")):
        "Be brief. USER:« one» ASSISTANT:« two</s>»USER:« three» ASSISTANT:« four</s>»",
    ("llava", (("user",), "turn")): "Be brief. USER:« one» ASSISTANT: two</s>USER:« three» ASSISTANT: four</s>",
    ("llava", (("user",), "all")): "Be brief. USER:« one» ASSISTANT: two«</s>»USER:« three» ASSISTANT: four«</s>»",
    ("llava", (("assistant",), "none")): "Be brief. USER: one ASSISTANT:« two»</s>USER: three ASSISTANT:« four»</s>",
    ("llama_text", (EVERYONE, "last")):
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n«Be brief.»<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n«one»<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two»<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n«three»<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»",
}


@pytest.mark.parametrize("name, knobs", WANTED)
def test_the_knobs_of_labels_choose_exactly_these_characters_and_tokens(name, knobs, family):  # noqa: F811
    template, encoder = family(name)
    (conversation,) = template.conversations(TALK, Labels(*knobs))
    wanted = WANTED[name, knobs]
    assert marked(conversation) == wanted.replace("»«", "")
    encoded = encoder.encode(conversation.text, conversation.spans, [])
    tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
    ids, labels = expected_tokens(tokenizer, wanted, adds_bos=name == "llava")
    assert encoded["input_ids"].tolist() == [ids]
    assert encoded["labels"].tolist() == [labels]


@pytest.mark.parametrize("train, wanted", [
    ({2: False}, CHATML.format("Be brief.", "", "one", "", "two", "", "three", "", "«four", "»")),
    ({4: False}, CHATML.format("Be brief.", "", "one", "", "«two", "»", "three", "", "four", "")),
    ({3: True, 4: False}, CHATML.format("Be brief.", "", "one", "", "«two", "»", "«three", "»", "four", "")),
])
def test_a_messages_own_train_goes_before_its_role(train, wanted, family):  # noqa: F811
    messages = [message | ({"train": train[place]} if place in train else {}) for place, message in enumerate(TALK)]
    (conversation,) = family("qwen2_5_vl")[0].conversations(messages)
    assert marked(conversation) == wanted


@pytest.mark.parametrize("train", [dict.fromkeys(range(5), False), {}])
def test_a_row_in_which_nothing_is_trained_is_a_reject(train, family):  # noqa: F811
    messages = [message | ({"train": train[place]} if place in train else {}) for place, message in enumerate(TALK)]
    with pytest.raises(RowError, match="nothing to learn: no tool message has a text"):
        family("qwen2_5_vl")[0].conversations(messages, Labels(("tool",)))


@pytest.mark.parametrize("name, labels, wanted", [
    ("turns end with nothing", Labels(("user",), "turn"), "user: «one»\nassistant: two\nuser: «three»\nassistant: four\n"),
    ("turns end with nothing", Labels(ends="none"), "user: one\nassistant: «two»\nuser: three\nassistant: «four»\n"),
    ("turns end with nothing", Labels(ends="last"),
     "user: one\nassistant: «two»\nuser: three\nassistant: «four<|im_end|>»\n"),
    ("turns end with the next one's header", Labels(EVERYONE),
     "<|endoftext|>«one»<|im_start|>«two<|endoftext|>»«three»<|im_start|>«four<|endoftext|>»"),
    ("turns end with plain characters", Labels(EVERYONE),
     "user: «one»###\nassistant: «two###»\nuser: «three»###\nassistant: «four###»\n"),
])
def test_a_template_of_any_behaviour_takes_the_knobs(name, labels, wanted, with_template):  # noqa: F811
    (conversation,) = with_template(TEMPLATES[name][0])[0].conversations(chat("one", "two", "three", "four"), labels)
    assert marked(conversation).replace(" «", "« ") == wanted.replace(" «", "« ")


def test_a_users_text_that_a_template_changes_is_a_reject_and_no_guess(with_template):  # noqa: F811
    shout = STRINGS.replace("m.content", "(m.content ~ '' if m.content | length > 8 else m.content | upper)")
    with pytest.raises(RowError):
        with_template(shout)[0].conversations(chat("one", "two"), Labels(EVERYONE))


# ---- tools and thoughts ----

TOOLS = "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
THOUGHT = "{% if m.reasoning_content and loop.index0 > last.user %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
LAST = "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}" \
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
AGENT = LAST + TOOLS + LOOP + "{{ m.role }}: " + THOUGHT + "{{ m.content }}" + CALLS + "<|im_end|>\n" + PROMPT \
    + "assistant: {% endif %}"
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "the \"red\" door"}}}


def agent(**first) -> list[dict]:
    """A question, a call with its result, and an answer."""
    return [*chat("one"), {"role": "assistant", "content": [], "tool_calls": [LOOK], **first},
            {"role": "tool", "content": [{"type": "text", "text": "shut"}]}, *chat("x", "two")[1:]]


def test_tool_calls_and_thoughts_are_trained_and_results_are_not(with_template):  # noqa: F811
    template = with_template(AGENT)[0].with_options([LOOK])
    (conversation,) = template.conversations(agent(reasoning_content="Hm."))
    call = '<call>{"name": "look", "arguments": {"at": "the \\"red\\" door"}}</call>'
    assert marked(conversation) == "tools: look <|im_end|>\nuser: one<|im_end|>\n" \
        f"assistant: «<think>Hm.</think>{call}<|im_end|>»\ntool: shut<|im_end|>\nassistant: «two<|im_end|>»\n"
    assert not any("look" in words for words in conversation.put_in)


def test_a_thought_that_a_later_question_removes_is_trained_in_a_sample_of_its_own(with_template):  # noqa: F811
    messages = chat("one", "two", "three", "four")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "Hm.", "Ah."
    found = with_template(AGENT)[0].conversations(messages)
    assert [marked(conversation) for conversation in found] == [
        "user: one<|im_end|>\nassistant: two<|im_end|>\nuser: three<|im_end|>\n"
        "assistant: «<think>Ah.</think>four<|im_end|>»\n",
        "user: one<|im_end|>\nassistant: «<think>Hm.</think>two<|im_end|>»\n"]


@pytest.mark.parametrize("without, dropped", [(TOOLS, "see"), (CALLS, "look"), (THOUGHT, "Hm.")])
def test_a_template_that_drops_tools_calls_or_thoughts_is_a_reject_by_name(without, dropped, with_template):  # noqa: F811
    template = with_template(AGENT.replace(without, ""))[0].with_options([{"function": {"name": "see"}}])
    messages = agent(reasoning_content="Hm.")
    if without is TOOLS:
        messages = [message for message in messages if "tool_calls" not in message and message["role"] != "tool"]
    with pytest.raises(RowError) as caught:
        template.conversations(messages)
    assert caught.value.reason == f"the chat template drops or changes this text: {dropped!r}"


def test_a_special_token_in_a_call_or_thought_is_a_reject(with_template):  # noqa: F811
    for extra in ({"reasoning_content": "<|im_end|>"}, {"tool_calls": [{"name": "<|im_end|>"}]}):
        with pytest.raises(RowError, match="spells the special token"):
            with_template(AGENT)[0].conversations(agent(**extra))


def test_arguments_of_the_template_reach_every_render(with_template):  # noqa: F811
    template = with_template("{{ '' if loud else 'quiet ' }}" + STRINGS)[0]
    texts = [template.with_options([], **options).conversations(chat("one", "two"))[0].text
             for options in ({}, {"loud": False}, {"loud": True})]
    assert texts[0] == texts[1] == "quiet " + texts[2]

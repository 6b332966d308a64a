"""Labels are exact in every family, with every template: what the model writes is trained, and nothing else.

An expected text is written by hand with «» around what is trained. Its tokens are those of its pieces, each
tokenized by itself, as inference has prompt and reply apart.
"""

import functools
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lib import registry
from lib.collator import IGNORE_INDEX
from lib.data.messages import normalise
from lib.media.media import read_medium
from lib.run.errors import RowError, StageError
from lib.text.chat import Encoder
from lib.text.processor import load_processor, stop_tokens, tokenizer_of
from lib.text.template import Labels, Template

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm2", "llama_text")
SEEING = FAMILIES[:-1]
PICTURE = "▣"  # a picture in the texts below

# What each family's template writes: what comes first, then a turn of each role.
FORMATS = {
    "llava": ("", {"system": "{} ", "user": "USER: {} ", "assistant": "ASSISTANT:« {}</s>»"}),
    "qwen2_5_vl": ("", {"system": "<|im_start|>system\n{}<|im_end|>\n",
                        "user": "<|im_start|>user\n{}<|im_end|>\n",
                        "assistant": "<|im_start|>assistant\n«{}<|im_end|>»\n"}),
    "gemma3": ("<bos>", {"system": "{}", "user": "<start_of_turn>user\n{}<end_of_turn>\n",
                         "assistant": "<start_of_turn>model\n«{}<end_of_turn>»\n"}),
    "smolvlm2": ("<|im_start|>", {"system": "System: {}<end_of_utterance>\n",
                                  "user": "User: {}<end_of_utterance>\n",
                                  "assistant": "Assistant:« {}<end_of_utterance>»\n"}),
    "llama_text": ("<|begin_of_text|>", {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n«{}<|eot_id|>»"}),
}
END_OF_TURN = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>",
               "smolvlm2": "<end_of_utterance>", "llama_text": "<|eot_id|>"}
# What the template writes for a picture, and what the processor makes of it: here of one with 32 x 32 pixels.
RENDERED = {"llava": "<image>\n", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
            "gemma3": "<start_of_image>", "smolvlm2": "<image>"}
TILE = "<fake_token_around_image><row_{}_col_{}><image><image><image><image>"
EXPANDED = {
    "llava": ("<image>", "<image>" * 16),
    "qwen2_5_vl": ("<|image_pad|>", "<|image_pad|>" * 4),
    "gemma3": ("<start_of_image>",
               "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"),
    "smolvlm2": ("<image>",
                 TILE.format(1, 1) + TILE.format(1, 2) + "\n" + TILE.format(2, 1) + TILE.format(2, 2) + "\n\n"
                 + "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"),
}


@functools.cache
def picture() -> Image.Image:
    return Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def family(zoo):
    """A function: a family's name -> its (template, encoder), as a user has them."""
    @functools.cache
    def family(name: str) -> tuple[Template, Encoder]:
        processor = load_processor(zoo(name))
        model_type = {"smolvlm2": "smolvlm", "llama_text": "llama"}.get(name, name)
        encoder = Encoder.of(processor, registry.family_of(model_type))
        return Template(processor, stop_tokens(zoo(name), processor)), encoder
    return family


def turns_of(*texts: str, system: str = "") -> list[tuple[str, str]]:
    """(role, text) pairs: the user and the assistant in turn, the system before them."""
    turns = [(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return [("system", system), *turns] if system else turns


def chat(*texts: str, system: str = "") -> list[dict]:
    """The messages of `turns_of`, with a picture's part for each ▣."""
    messages = []
    for role, text in turns_of(*texts, system=system):
        parts = []
        for number, words in enumerate(text.split(PICTURE)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": words}] * bool(words)
        messages.append({"role": role, "content": parts})
    return messages


def expected(name: str, *texts: str, system: str = "") -> str:
    """The render of `turns_of` in a family's turn format, with «» around what is trained."""
    text, turn_of = FORMATS[name]
    turns = turns_of(*texts, system=system)
    if name == "qwen2_5_vl" and not system:
        text += turn_of["system"].format("You are a helpful assistant.")
    if name == "gemma3" and system:  # the system text opens the first user turn
        turns = [("user", f"{system}\n\n{texts[0]}"), *turns[2:]]
    for role, words in turns:
        turn = turn_of[role].format(words)
        text += turn.replace("User: ▣", "User:▣") if name == "smolvlm2" else turn
    return text.replace(PICTURE, RENDERED.get(name, ""))


def assert_labels(name: str, template: Template, encoder: Encoder, messages: list[dict], marked: str) -> None:
    """Assert that the row is one sample, `marked` without «», and exactly the tokens in «» are trained."""
    (conversation,) = template.conversations(messages)
    assert conversation.text == marked.replace("«", "").replace("»", "")
    encoded = encoder.encode(conversation.text, conversation.spans, [picture()] * conversation.media)
    marked = marked.replace(*EXPANDED.get(name, (PICTURE, PICTURE)))
    ids, labels = expected_tokens(tokenizer_of(encoder.processor), marked, adds_bos=name == "llava")
    assert encoded["input_ids"].tolist() == [ids]
    assert encoded["labels"].tolist() == [labels]


def expected_tokens(tokenizer, marked: str, adds_bos: bool = False) -> tuple[list[int], list[int]]:
    """(ids, labels) of a text with «», tokenized piece by piece; LLaVA's tokenizer begins with a <s>."""
    ids, labels = [], []
    for number, piece in enumerate(marked.replace("»", "«").split("«")):
        # Behind a special token, where no tokenizer adds a space of its own.
        lead = tokenizer.eos_token if number else ""
        new = tokenizer(lead + piece, add_special_tokens=adds_bos and not number)["input_ids"][bool(lead):]
        ids += new
        labels += new if number % 2 else [IGNORE_INDEX] * len(new)
    return ids, labels


# ---- every family ----

CHATS = {
    "one picture": ["▣What is it?", "the cat."],
    "several pictures in one turn": ["▣▣Which one is red?", "Both are."],
    "pictures in several turns": ["▣What is it?", "A cat.", "▣And here?", "Another."],
    "text only": ["Is it on?", "It is on."],
    "many turns": ["one", "two", "three", "four", "five", "six"],
    "a question left open": ["one", "two", "three"],
    "replies that are part of an end of turn": ["s", "s", "turn", "end", "im", "|"],
    "letters of several bytes": ["é 😀", "日本 😀 é"],
}


@pytest.mark.parametrize("name, case", [(name, case) for name in FAMILIES for case in CHATS
                                        if name in SEEING or PICTURE not in str(CHATS[case])])
def test_exactly_the_replies_and_their_ends_are_trained(name, case, family):
    assert_labels(name, *family(name), chat(*CHATS[case]), expected(name, *CHATS[case]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_not_trained(name, family):
    words = {"system": "Be brief."}
    assert_labels(name, *family(name), chat("one", "two", **words), expected(name, "one", "two", **words))


@pytest.mark.parametrize("name, marked", [
    ("llava", "USER: Draw one. ASSISTANT: <image>\n«Here.</s>»"),
    ("qwen2_5_vl", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                   "<|im_start|>user\nDraw one.<|im_end|>\n<|im_start|>assistant\n"
                   "<|vision_start|><|image_pad|><|vision_end|>«Here.<|im_end|>»\n"),
    ("gemma3", "<bos><start_of_turn>user\nDraw one.<end_of_turn>\n"
               "<start_of_turn>model\n<start_of_image>«Here.<end_of_turn>»\n"),
    ("smolvlm2", "<|im_start|>User: Draw one.<end_of_utterance>\n"
                 "Assistant:<image>«Here.<end_of_utterance>»\n"),
])
def test_a_picture_in_a_reply_is_not_trained_nor_what_stands_around_it(name, marked, family):
    assert_labels(name, *family(name), chat("Draw one.", "▣Here."), marked)


@pytest.mark.parametrize("name", SEEING)
def test_the_words_around_pictures_in_a_reply_are_trained(name, family):
    marked = expected(name, "Draw two.", "One: ▣ two: ▣")
    if name == "gemma3":  # which trims each part
        marked = marked.replace("One: ", "One:").replace(" two: ", "two:")
    marked = marked.replace(RENDERED[name], f"»{RENDERED[name]}«")
    assert_labels(name, *family(name), chat("Draw two.", "One: ▣ two: ▣"), marked)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_before_a_reply_is_the_prompt_of_inference_in_text_and_tokens(name, family):
    template, encoder = family(name)
    mark = PICTURE if name in SEEING else ""
    messages = chat(f"{mark}one", "two", f"{mark}three", "four", system="Be brief.")
    (conversation,) = template.conversations(messages)
    encoded = encoder.encode(conversation.text, conversation.spans, [picture()] * conversation.media)
    trained = (encoded["labels"][0] != IGNORE_INDEX).nonzero().flatten().tolist()
    firsts = [place for place in trained if place - 1 not in trained]
    for (start, _), first, upto in zip(conversation.spans, firsts, (2, 4), strict=True):
        given = messages[:upto]
        if name == "llama_text":  # whose template takes strings only
            given = [{**message, "content": message["content"][0]["text"]} for message in given]
        ask = functools.partial(encoder.processor.apply_chat_template, given, add_generation_prompt=True)
        assert conversation.text[:start] == ask(tokenize=False)
        for part in (part for message in given for part in message["content"] if name in SEEING):
            part |= {"image": picture()} if part["type"] == "image" else {}
        prompt = ask(tokenize=True, return_dict=True, return_tensors="pt")
        assert encoded["input_ids"][0, :first].tolist() == prompt["input_ids"][0].tolist()


# ---- texts that a template or a tokenizer would take for something else ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_text_that_spells_a_special_token_is_rejected_by_name(name, role, family):
    messages, end = chat("one", "two", system="Be brief."), END_OF_TURN[name]
    number = ["system", "user", "assistant"].index(role)
    messages[number]["content"][0]["text"] += f"{end}\nassistant: no"
    with pytest.raises(RowError) as caught:
        family(name)[0].conversations(messages)
    assert caught.value.reason == f"message {number} ({role}) spells the special token {end!r}"


def test_a_special_token_spelled_by_two_parts_together_is_rejected(family):
    messages = chat("<|im_", "two")
    messages[0]["content"] += [{"type": "text", "text": "end|>"}]
    with pytest.raises(RowError, match="spells the special token '<|im_end|>'"):
        family("qwen2_5_vl")[0].conversations(messages)


@pytest.mark.parametrize("name, typed", [
    ("llava", "<image>"), ("qwen2_5_vl", "<|image_pad|>"), ("qwen2_5_vl", "<|vision_start|>"),
    ("gemma3", "<start_of_image>"), ("gemma3", "<image_soft_token>"),
    ("smolvlm2", "<image>"), ("smolvlm2", "<row_1_col_1>"),
])
def test_a_placeholder_that_a_user_types_is_rejected_by_name(name, typed, family):
    with pytest.raises(RowError) as caught:
        family(name)[0].conversations(chat(f"see {typed} here", "two"))
    assert typed in caught.value.reason and "image" in caught.value.fix


def test_the_image_placeholder_of_other_kits_is_rejected_where_it_is_only_characters():
    row = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}], "images": ["a.png", "b.png"]}
    with pytest.raises(RowError, match="message 0 has <image> in its text, which is only characters here"):
        normalise(row)


def test_a_header_of_plain_characters_that_a_user_spells_is_not_trained(family):
    texts = "one ASSISTANT: no USER: x", "two"
    assert_labels("llava", *family("llava"), chat(*texts), expected("llava", *texts))


# ---- templates of every behaviour that real ones have ----

MULTI = ("one", "two", "three", "four")
LOOP = "{% for m in messages %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}"
TURN = "<|im_start|>{{ m.role }}\n{{ TEXT }}<|im_end|>\n"
CHATML = LOOP + TURN + PROMPT + "<|im_start|>assistant\n{% endif %}"
CHAT = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n" \
    "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n«four<|im_end|>»\n"


def chatml(text: str, either: bool = False) -> str:
    """ChatML, where `text` is the Jinja of a message's text; `either` lets a string through before it."""
    return CHATML.replace("TEXT", f"(m.content if m.content is string else {text})" if either else text)


JOINED = "m.content | map(attribute='text') | join"  # of a string it is nothing: characters have no text
STRINGS = chatml("'' + m.content")  # raises for a list
TEMPLATES = {  # name: (Jinja, the texts of the samples of MULTI, with «»)
    "strings and typed parts alike": (chatml(JOINED, either=True), [CHAT]),
    "typed content raises": (STRINGS, [CHAT]),
    "typed content is dropped": (chatml("''", either=True), [CHAT]),
    "typed content is printed as a Python list": (chatml("m.content"), [CHAT]),
    "typed content is printed as JSON": (chatml("m.content | tojson", either=True), [CHAT]),
    "typed content is printed as JSON lines": (chatml("m.content | tojson(indent=2)", either=True), [CHAT]),
    "typed content of replies alone is dropped": (
        chatml("m.content[0].text if m.role == 'user'", either=True), [CHAT]),
    "strings are dropped": (chatml(JOINED), [CHAT]),
    "content is trimmed": (chatml("m.content | trim"), [CHAT]),
    "no newline after the end of turn": (
        STRINGS.replace("<|im_end|>\n", "<|im_end|>"),
        [CHAT.replace("<|im_end|>\n", "<|im_end|>").replace("»\n", "»")]),
    "a space stands before each reply": (
        LOOP + "{{ m.role }}: {{ '' + m.content }}<|im_end|>" + PROMPT + "assistant:{% endif %}",
        ["user: one<|im_end|>assistant:« two<|im_end|>»user: three<|im_end|>assistant:« four<|im_end|>»"]),
    "an empty thought opens each reply": (
        chatml("('\n<think></think>\n' if m.role == 'assistant' else '') + m.content"),
        [CHAT.replace("«", "«\n<think></think>\n")]),
    "an empty thought opens the last reply only": (
        chatml("('<think></think>' if m.role == 'assistant' and loop.last else '') + m.content"),
        [CHAT.replace("«two<|im_end|>»", "two<|im_end|>").replace("«four", "«<think></think>four"),
         CHAT.split("<|im_start|>user\nthree")[0].replace("«", "«<think></think>")]),
    "an eos stands at the very end": (
        STRINGS.replace("{% if", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if"),
        [CHAT + "<|endoftext|>"]),
    "the prompt opens a thought that no finished turn has": (
        STRINGS.replace("assistant\n{% endif", "assistant\n<think>{% endif"), [CHAT]),
    "no generation prompt": (  # then the model has to write the header as well
        STRINGS.split("{% if")[0], [CHAT.replace("<|im_start|>assistant\n«", "«<|im_start|>assistant\n")]),
    "turns end with two tokens, and generation at the second": (
        STRINGS.replace("}}<|im_end|>", "}}<|im_start|><|im_end|>"),
        [CHAT.replace("<|im_end", "<|im_start|><|im_end")]),
    "turns end with nothing": (
        LOOP + "{{ m.role }}: {{ '' + m.content }}\n" + PROMPT + "assistant: {% endif %}",
        ["user: one\nassistant: «two<|im_end|>»\nuser: three\nassistant: «four<|im_end|>»\n"]),
    "turns end with plain characters": (
        LOOP + "{{ m.role }}: {{ '' + m.content }}###\n" + PROMPT + "assistant: {% endif %}",
        ["user: one###\nassistant: «two###»\nuser: three###\nassistant: «four###»\n"]),
    "turns end with the next one's header": (  # at which generation stops
        LOOP + "{{ '<|endoftext|>' if m.role == 'user' else '<|im_start|>' }}{{ '' + m.content }}"
        + PROMPT + "<|im_start|>{% endif %}",
        ["<|endoftext|>one<|im_start|>«two<|endoftext|>»three<|im_start|>«four<|endoftext|>»"]),
}


@pytest.fixture
def with_template(zoo):
    """A function: Jinja -> (template, encoder) of a text-only checkpoint that stops at two tokens."""
    def with_template(jinja: str) -> tuple[Template, Encoder]:
        tokenizer = load_processor(zoo("qwen_text"))
        tokenizer.chat_template = jinja
        encoder = Encoder.of(tokenizer, registry.family_of("qwen2"))
        return Template(tokenizer, ("<|im_end|>", "<|endoftext|>")), encoder
    return with_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_any_behaviour_gives_exact_labels(name, with_template):
    jinja, wanted = TEMPLATES[name]
    template, encoder = with_template(jinja)
    conversations = template.conversations(chat(*MULTI))
    assert [marked(conversation) for conversation in conversations] == wanted
    for conversation, text in zip(conversations, wanted):
        encoded = encoder.encode(conversation.text, conversation.spans, [])
        ids, labels = expected_tokens(encoder.processor, text)
        assert encoded["input_ids"].tolist() == [ids]
        assert encoded["labels"].tolist() == [labels]


def marked(conversation) -> str:
    """A conversation's text with «» around its spans."""
    text = conversation.text
    for start, end in reversed(conversation.spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("name, added", [("turns end with nothing", 2), ("content is trimmed", 0),
                                         ("turns end with the next one's header", 1)])
def test_ends_that_the_kit_adds_are_counted(name, added, with_template):
    assert with_template(TEMPLATES[name][0])[0].conversations(chat(*MULTI))[0].ends_added == added


@pytest.mark.parametrize("jinja, system, reason", [
    (chatml("m.content | upper"), "", "the chat template drops or changes this text: 'one'"),
    (chatml("(m.content | upper if m.role == 'assistant' else m.content)"), "",
     "the chat template's finished turn isn't its prompt, the reply's text and an end"),
    (STRINGS.replace("messages", "messages[1:]"), "o", "the chat template drops or changes this text: 'o'"),
    ("{{ raise_exception('roles\nmust alternate') }}", "",
     "the chat template refuses this conversation: roles must alternate"),
    ("{{ messages[99].content | length }}", "", "the chat template refuses this conversation: "),
], ids=["changes every text", "changes replies", "drops a letter that others have", "raises", "fails"])
def test_a_template_whose_labels_would_be_guessed_is_a_reject_by_name(jinja, system, reason, with_template):
    with pytest.raises(RowError) as caught:
        with_template(jinja)[0].conversations(chat(*MULTI, system=system))
    assert caught.value.reason.startswith(reason) and "chat_template" in caught.value.fix


def test_a_system_text_that_moves_to_the_last_question_gives_each_reply_a_sample_of_its_own(with_template):
    jinja = "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}" \
        "{% for m in messages[1:] %}{{ m.role }}: {{ messages[0].content + ' ' if m == asked[-1] }}" \
        "{{ m.content }}<|im_end|>" + PROMPT + "assistant: {% endif %}"
    found = with_template(jinja)[0].conversations(chat(*MULTI, system="Be brief."))
    assert [marked(conversation) for conversation in found] == [
        "user: one<|im_end|>assistant: two<|im_end|>"
        "user: Be brief. three<|im_end|>assistant: «four<|im_end|>»",
        "user: Be brief. one<|im_end|>assistant: «two<|im_end|>»"]


def test_a_system_text_that_only_a_last_question_shows_is_a_reject(with_template):
    jinja = LOOP.replace("messages", "messages[1:]") + "{{ m.role }}: " \
        "{{ messages[0].content + ' ' if loop.last and m.role == 'user' }}{{ m.content }}<|im_end|>" \
        + PROMPT + "assistant: {% endif %}"
    for texts in (MULTI[:3], MULTI):  # a question left open shows it, yet behind the reply that it is about
        with pytest.raises(RowError, match="the chat template drops or changes this text: 'Be brief.'"):
            with_template(jinja)[0].conversations(chat(*texts, system="Be brief."))


def test_a_thought_that_the_prompt_opens_is_trained_from_where_the_model_goes_on(with_template):
    jinja = STRINGS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    (conversation,) = with_template(jinja)[0].conversations(chat("one", "<think>\nhm\n</think>two"))
    assert marked(conversation) == "<|im_start|>user\none<|im_end|>\n" \
        "<|im_start|>assistant\n<think>\n«hm\n</think>two<|im_end|>»\n"


def test_a_template_that_is_no_jinja_stops_with_its_line(with_template):
    with pytest.raises(StageError, match="chat_template: line 2: "):
        with_template("{{ messages }}\n{% for %}")
    tokenizer = with_template(STRINGS)[0].processor
    tokenizer.chat_template = "{{ strftime_now('%Y') }}\n{% for %}"
    with pytest.raises(StageError, match="chat_template: line 2: "):
        Template(tokenizer, day="2026-07-14").render(chat("one"))


def test_a_stopped_clock_changes_nothing_else_in_a_render(with_template):
    block = "{% if strftime_now is defined %}x{% endif %}"
    for start in ("", " ", "\n", f"  {block}\n", "{#- x -#}\n", f"\n\n  {block}", " {%- set x = 1 %}"):
        tokenizer = with_template(start + block + STRINGS)[0].processor
        texts = [Template(tokenizer, day=day).render(chat("one", "two")) for day in (None, "2026-07-14")]
        assert texts[0] == texts[1] and texts[0].endswith("<|im_end|>\n")


@pytest.fixture
def changed(family, monkeypatch):
    """A function: a family and what to make of its Jinja -> (template, encoder), for this test."""
    def changed(name: str, change) -> tuple[Template, Encoder]:
        _, encoder = family(name)
        monkeypatch.setattr(encoder.processor, "chat_template", change(encoder.processor.chat_template))
        return Template(encoder.processor), encoder
    return changed


def test_a_row_that_the_template_refuses_changes_nothing_for_the_rows_after_it(changed):
    refuse = "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    template, encoder = changed("qwen2_5_vl", lambda jinja: refuse + jinja)
    with pytest.raises(RowError, match="refuses this conversation: no"):
        template.conversations(chat("one", "two")[1:])
    texts = "▣What is it?", "A cat."
    assert_labels("qwen2_5_vl", template, encoder, chat(*texts), expected("qwen2_5_vl", *texts))


def test_a_template_that_shows_fewer_pictures_than_the_row_has_is_a_reject(changed):
    turn = "{{ '<image>' if m.role == 'user' }}{% for p in m.content %}{{ p.text }}{% endfor %}</s>"
    template, _ = changed("llava", lambda jinja: LOOP + turn + "{% endfor %}")
    with pytest.raises(RowError, match="^2 images in the messages, 1 in the render$"):
        template.conversations(chat("▣▣one", "two"))


def test_a_picture_for_a_model_without_pictures_is_a_reject(family):
    with pytest.raises(RowError, match=r"message 0 \(user\) has a picture, and base_model takes none"):
        family("llama_text")[0].conversations(chat("▣one", "two"))


@pytest.mark.parametrize("texts", [["one"], ["one", ""], ["one", " \n"], ["one", "▣"]], ids=str)
def test_a_row_without_a_reply_has_nothing_to_learn(texts, family):
    with pytest.raises(RowError, match="nothing to learn: no assistant message has a text"):
        family("llava")[0].conversations(chat(*texts))


# ---- a tokenizer that merges across the seam of prompt and reply ----


def test_a_reply_that_starts_with_a_newline_is_tokenized_as_inference_does(family):
    template, encoder = family("qwen2_5_vl")
    assert "ĊĊ" in tokenizer_of(encoder.processor).tokenize("assistant\n\nYes")  # the trap is there
    texts = "▣Is it?", "\nYes", "▣Sure?", "\n\nYes"
    assert_labels("qwen2_5_vl", template, encoder, chat(*texts), expected("qwen2_5_vl", *texts))


def test_token_types_stay_with_the_picture_where_a_reply_is_tokenized_apart(changed):
    template, encoder = changed("gemma3", lambda jinja: jinja.replace(" | trim", ""))
    texts = "▣Is it?", "\nYes"
    assert_labels("gemma3", template, encoder, chat(*texts), expected("gemma3", *texts))
    (conversation,) = template.conversations(chat(*texts))
    encoded = encoder.encode(conversation.text, conversation.spans, [picture()])
    tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert encoded["token_type_ids"].tolist() == [[int(token == "<image_soft_token>") for token in tokens]]
    assert encoded["attention_mask"].shape == encoded["input_ids"].shape == encoded["labels"].shape


def test_what_goes_along_the_tokens_stays_with_them_where_a_reply_is_tokenized_apart(family, monkeypatch):
    template, encoder = family("qwen2_5_vl")
    encoder = replace(encoder, collate="stack")                    # mllama's, whose mask says what each token sees
    (conversation,) = template.conversations(chat("▣Is it?", "\nYes", "▣Sure?", "\n\nYes"))
    media = [picture(), picture()]
    batch, replaced = encoder.process(conversation.text, media)
    merged = batch["input_ids"][0].tolist()
    mask = torch.arange(len(merged)).view(1, -1, 1, 1)
    monkeypatch.setattr(encoder, "process", lambda *_: (batch | {"cross_attention_mask": mask}, replaced))
    encoded = encoder.encode(conversation.text, conversation.spans, media)
    ids, places = encoded["input_ids"][0].tolist(), encoded["cross_attention_mask"].flatten().tolist()
    assert len(places) == len(ids) == len(merged) + 1 and places == sorted(places)
    others = [place for place, i in zip(places, ids) if merged[place] != i]
    assert {*places} >= {*range(len(merged))} - {*others, *(place + 1 for place in others)} and len(others) <= 4


def test_a_tokenizer_that_begins_a_text_with_a_space_puts_none_before_a_reply_apart(changed):
    template, encoder = changed("llava", lambda jinja: jinja.replace("ASSISTANT: ", "ASSISTANT:\n").replace(
        "'ASSISTANT:'", "'ASSISTANT:\n'"))
    texts = "▣Is it?", "\nYes"
    marked = expected("llava", *texts).replace("ASSISTANT:« ", "ASSISTANT:\n«")
    assert_labels("llava", template, encoder, chat(*texts), marked)


def trained(texts: list[str], prompt: str, **parts) -> PreTrainedTokenizerFast:
    """A tokenizer that merges what is frequent in these texts; its template's header is role and `prompt`."""
    backend = Tokenizer(models.BPE())
    for name, part in parts.items():
        setattr(backend, name, part)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False)
    backend.train_from_iterator(texts * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    turn = f"{{{{ m.role }}}}{prompt}{{{{ '' + m.content }}}}<end>"
    tokenizer.chat_template = LOOP + turn + PROMPT + f"assistant{prompt}{{% endif %}}"
    return tokenizer


def test_a_colon_and_newlines_that_merge_are_tokenized_apart():
    tokenizer = trained(["assistant:\n\nYes", "user: one", ":\n\n"], ":", decoder=decoders.Fuse())
    tokens = tokenizer.tokenize("assistant:\n\nYes")
    assert any(":" in token and "\n" in token for token in tokens)  # the trap is there
    encoder = Encoder.of(tokenizer, registry.family_of("llama"))
    marked = "user:one<end>assistant:«\n\nYes<end>»"
    assert_labels("", Template(tokenizer), encoder, chat("one", "\n\nYes"), marked)


def test_a_space_of_the_prompt_that_merges_with_the_reply_is_tokenized_apart():
    tokenizer = trained(["assistant: Yes", "user: one"], ": ", decoder=decoders.ByteLevel(),
                        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
                        post_processor=processors.ByteLevel(trim_offsets=True))
    whole = tokenizer("assistant: Yes", return_offsets_mapping=True)
    assert whole.tokens()[-1] == "ĠYes" and whole["offset_mapping"][-1] == (11, 14)  # a hidden space
    encoder = Encoder.of(tokenizer, registry.family_of("llama"))
    assert_labels("", Template(tokenizer), encoder, chat("one", "Yes"), "user: one<end>assistant: «Yes<end>»")


def reply_of(conversation) -> dict:
    """As a sample has it."""
    return dict(zip(("start", "end"), conversation.reply))


def test_the_prompt_for_an_answer_ends_where_the_last_reply_starts(family, tmp_path):
    template, encoder = family("llava")
    picture().save(tmp_path / "a.png")
    (conversation,) = template.conversations(chat("▣one", "two", "▣three", " four \n"))
    media = [read_medium("a.png", tmp_path)[0]] * 2
    text, images, reply = encoder.prompt({"text": conversation.text, "reply": reply_of(conversation), "media": media})
    assert text.endswith("three ASSISTANT:") and len(images) == 2 and reply == "four"


FOUR = ("one", "two", "three", "four")


@pytest.mark.parametrize("labels, texts, trains, asked, answer", [
    (Labels(("system", "user", "assistant", "tool")), (*FOUR, "five"), {}, "three", "four"),
    (Labels(("user",)), FOUR, {}, "three", "four"),
    (Labels(("user",), "all"), (*FOUR, "five"), {}, "three", "four"),
    (Labels(), FOUR, {3: False}, "one", "two"),
    (Labels(("user",)), ("one",), {}, "", "one"),
])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_the_answer_that_is_asked_for_is_the_last_reply_whoever_trains(name, labels, texts, trains, asked, answer, family):
    template, encoder = family(name)
    messages = [message | ({"train": trains[place]} if place in trains else {})
                for place, message in enumerate(chat(*texts))]
    (conversation,) = template.conversations(messages, labels)
    text, _, reply = encoder.prompt({"text": conversation.text, "reply": reply_of(conversation), "media": []})
    assert reply == answer and asked in text and answer not in text


def test_a_conversation_whose_turns_the_kit_ends_has_its_answer_in_the_right_place(with_template):
    (conversation,) = with_template(TEMPLATES["turns end with nothing"][0])[0].conversations(chat(*FOUR))
    assert conversation.ends_added == 2
    assert conversation.text[slice(*conversation.reply)].strip() == "four"

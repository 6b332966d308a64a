"""Labels are exact: what the model has to write is trained, and nothing else, in every family and with every template.

An expected text is written by hand with «» around what is trained. Its tokens are those of its pieces, each tokenized by
itself, since inference has prompt and reply apart.
"""

import functools

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast

from lib import registry
from lib.chat import IGNORE_INDEX, Encoder, load_processor, stop_tokens, tokenizer_of
from lib.collator import collate
from lib.messages import RowError, normalise
from lib.stage import StageError
from lib.template import Template

MODEL_TYPES = {"llava": "llava", "qwen2_5_vl": "qwen2_5_vl", "gemma3": "gemma3", "smolvlm2": "smolvlm", "llama_text": "llama"}
FAMILIES = tuple(MODEL_TYPES)
SEEING = FAMILIES[:-1]
PICTURE = "▣"  # a picture in the expected texts below

# What each family's template writes: what comes first, then a turn of each role. The newline after a turn is its header's.
FORMATS = {
    "llava": ("", {"system": "{} ", "user": "USER: {} ", "assistant": "ASSISTANT:« {}</s>»"}),
    "qwen2_5_vl": ("", {"system": "<|im_start|>system\n{}<|im_end|>\n", "user": "<|im_start|>user\n{}<|im_end|>\n",
                        "assistant": "<|im_start|>assistant\n«{}<|im_end|>»\n"}),
    "gemma3": ("<bos>", {"system": "{}", "user": "<start_of_turn>user\n{}<end_of_turn>\n",
                         "assistant": "<start_of_turn>model\n«{}<end_of_turn>»\n"}),
    "smolvlm2": ("<|im_start|>", {"system": "System: {}<end_of_utterance>\n", "user": "User: {}<end_of_utterance>\n",
                                  "assistant": "Assistant:« {}<end_of_utterance>»\n"}),
    "llama_text": ("<|begin_of_text|>", {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n«{}<|eot_id|>»"}),
}
END_OF_TURN = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "smolvlm2": "<end_of_utterance>",
               "llama_text": "<|eot_id|>"}
# What the template writes for a picture, and what the processor makes of it: here of one with 32 x 32 pixels.
RENDERED = {"llava": "<image>\n", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>",
            "smolvlm2": "<image>"}
TILE = "<fake_token_around_image><row_{}_col_{}><image><image><image><image>"
EXPANDED = {
    "llava": ("<image>", "<image>" * 16),
    "qwen2_5_vl": ("<|image_pad|>", "<|image_pad|>" * 4),
    "gemma3": ("<start_of_image>", "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"),
    "smolvlm2": ("<image>", TILE.format(1, 1) + TILE.format(1, 2) + "\n" + TILE.format(2, 1) + TILE.format(2, 2) + "\n\n"
                 "<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"),
}


@functools.cache
def picture() -> Image.Image:
    return Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def family(zoo):
    """A function: a family's name -> its (template, encoder) as a user has them."""
    @functools.cache
    def family(name: str) -> tuple[Template, Encoder]:
        processor = load_processor(zoo(name))
        template = Template(processor, stop_tokens(zoo(name), processor))
        return template, Encoder.of(processor, registry.family_of(MODEL_TYPES[name]))
    return family


def messages_of(*turns: tuple[str, str]) -> list[dict]:
    """Messages of (role, text) pairs; a ▣ in a text is a picture's part."""
    def parts(text):
        pieces = [[{"type": "image"}, *([{"type": "text", "text": t}] if t else [])] for t in text.split(PICTURE)]
        return [part for piece in pieces for part in piece][1:]
    return [{"role": role, "content": parts(text)} for role, text in turns]


def expected(name: str, *turns: tuple[str, str]) -> str:
    """The render of (role, text) pairs in a family's turn format, with «» around what is trained."""
    text, turn_of = FORMATS[name]
    system = turns[0][1] if turns[0][0] == "system" else ""
    if name == "qwen2_5_vl" and not system:
        text += "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    if name == "gemma3" and system:  # the system text opens the first user turn
        turns = [("user", f"{system}\n\n{turns[1][1]}"), *turns[2:]]
    for role, words in turns:
        turn = turn_of[role].format(words)
        text += turn.replace("User: ▣", "User:▣") if name == "smolvlm2" else turn
    return text.replace(PICTURE, RENDERED.get(name, ""))


def assert_labels(name, template, encoder, messages, marked):
    """The row is one sample: its text is `marked` without «», and exactly the tokens in «» are trained."""
    (conversation,) = template.conversations(messages)
    assert conversation.text == marked.replace("«", "").replace("»", "")
    images = [picture()] * conversation.media
    encoded = encoder.encode(conversation.text, conversation.spans, images)
    ids, labels = expected_tokens(tokenizer_of(encoder.processor), marked, *EXPANDED.get(name, ("▣", "")))
    assert encoded["input_ids"].tolist() == [ids]
    assert encoded["labels"].tolist() == [labels]


def expected_tokens(tokenizer, marked: str, placeholder: str = "▣", tokens: str = "") -> tuple[list[int], list[int]]:
    """(ids, labels) of a text with «», tokenized piece by piece; `tokens` stand in place of each placeholder."""
    ids, labels, trained = [], [], False
    for number, piece in enumerate(marked.replace(placeholder, tokens).replace("»", "«").split("«")):
        # Behind a special token, where no tokenizer adds a space of its own.
        lead = tokenizer.eos_token if number else ""
        new = tokenizer(lead + piece, add_special_tokens=False)["input_ids"][bool(lead):]
        ids += new
        labels += new if trained else [IGNORE_INDEX] * len(new)
        trained = not trained
    return ids, labels


CONVERSATIONS = {
    "one picture": (("user", "▣What is it?"), ("assistant", "the cat.")),
    "several pictures in one turn": (("user", "▣▣Which one is red?"), ("assistant", "Both are.")),
    "pictures in several turns": (("user", "▣What is it?"), ("assistant", "A cat."), ("user", "▣And here?"),
                                  ("assistant", "Another.")),
    "text only": (("user", "Is it on?"), ("assistant", "It is on.")),
    "a system prompt": (("system", "Be brief."), ("user", "Is it on?"), ("assistant", "Yes.")),
    "many turns": (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five"),
                   ("assistant", "six")),
    "a question left open": (("user", "one"), ("assistant", "two"), ("user", "three")),
    "a reply that is in the end of turn too": (("user", "s"), ("assistant", "s"), ("user", "turn"), ("assistant", "end")),
    "letters of several bytes": (("user", "é 😀"), ("assistant", "日本 😀 é")),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_exactly_the_replies_and_their_ends_are_trained(name, case, family):
    turns = CONVERSATIONS[case]
    if name == "llama_text" and PICTURE in str(turns):
        pytest.skip("a model without pictures")
    assert_labels(name, *family(name), messages_of(*turns), expected(name, *turns))


@pytest.mark.parametrize("name, marked", [
    ("llava", "USER: Draw one. ASSISTANT: <image>\n«Here.</s>»"),
    ("qwen2_5_vl", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDraw one.<|im_end|>\n"
                   "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>«Here.<|im_end|>»\n"),
    ("gemma3", "<bos><start_of_turn>user\nDraw one.<end_of_turn>\n<start_of_turn>model\n<start_of_image>"
               "«Here.<end_of_turn>»\n"),
    ("smolvlm2", "<|im_start|>User: Draw one.<end_of_utterance>\nAssistant:<image>«Here.<end_of_utterance>»\n"),
])
def test_a_picture_in_a_reply_is_not_trained_nor_what_stands_around_it(name, marked, family):
    assert_labels(name, *family(name), messages_of(("user", "Draw one."), ("assistant", "▣Here.")), marked)


@pytest.mark.parametrize("name", SEEING)
def test_the_words_before_and_after_a_picture_in_a_reply_are_trained(name, family):
    marked = expected(name, ("user", "Draw two."), ("assistant", "One: ▣ two: ▣"))
    if name == "gemma3":  # which trims each part
        marked = marked.replace("One: ", "One:").replace(" two: ", "two:")
    for rendered in (RENDERED[name],):
        marked = marked.replace(rendered, f"»{rendered}«")
    assert_labels(name, *family(name), messages_of(("user", "Draw two."), ("assistant", "One: ▣ two: ▣")), marked)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_turn_is_trained_and_the_newline_after_it_is_not(name, family):
    template, encoder = family(name)
    (conversation,) = template.conversations(messages_of(("user", "one"), ("assistant", "two")))
    encoded = encoder.encode(conversation.text, conversation.spans, [])
    trained = [place for place, label in enumerate(encoded["labels"][0].tolist()) if label != IGNORE_INDEX]
    tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert tokens[trained[-1]] == END_OF_TURN[name]
    assert tokens[trained[-1] + 1:] in ([], ["\n"], ["Ċ"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pad_id_equal_to_the_end_of_turn_does_not_swallow_it(name, family, zoo):
    template, encoder = family(name)
    end = tokenizer_of(encoder.processor).convert_tokens_to_ids(END_OF_TURN[name])
    rows = [encoder.encode(c.text, c.spans, []) for text in ("two", "a much longer reply")
            for c in template.conversations(messages_of(("user", "one"), ("assistant", text)))]
    batch = collate(rows, pad_id=end)
    for row, whole in zip(rows, batch["labels"]):
        tokens = row["labels"].shape[1]
        assert torch.equal(whole[:tokens], row["labels"][0]) and end in whole.tolist()
        assert (whole[tokens:] == IGNORE_INDEX).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_before_a_reply_is_the_prompt_of_inference(name, family):
    template, encoder = family(name)
    messages = messages_of(("system", "Be brief."), ("user", "▣one" if name in SEEING else "one"), ("assistant", "two"),
                           ("user", "three"), ("assistant", "four"))
    (conversation,) = template.conversations(messages)
    for (start, _), end in zip(conversation.spans, (2, 4)):
        given = messages[:end]
        if name == "llama_text":  # whose template takes strings only
            given = [{**message, "content": message["content"][0]["text"]} for message in given]
        prompt = encoder.processor.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
        assert conversation.text[:start] == prompt


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_text_that_spells_a_special_token_is_rejected_by_name(name, role, family):
    end = END_OF_TURN[name]
    turns = {"system": "Be brief.", "user": "one", "assistant": "two"}
    turns[role] += f"{end}\nassistant: no"
    with pytest.raises(RowError) as caught:
        family(name)[0].conversations(messages_of(*turns.items()))
    assert caught.value.reason == f"message {list(turns).index(role)} ({role}) spells the special token {end!r}"


def test_a_special_token_spelled_by_two_parts_together_is_rejected(family):
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    with pytest.raises(RowError, match="spells the special token '<|im_end|>'"):
        family("qwen2_5_vl")[0].conversations([{"role": "user", "content": parts}, *messages_of(("assistant", "two"))])


@pytest.mark.parametrize("name, typed", [("llava", "<image>"), ("qwen2_5_vl", "<|image_pad|>"), ("smolvlm2", "<image>"),
                                         ("qwen2_5_vl", "<|vision_start|>"), ("gemma3", "<start_of_image>"),
                                         ("gemma3", "<image_soft_token>"), ("smolvlm2", "<row_1_col_1>")])
def test_a_placeholder_that_a_user_types_is_rejected_by_name(name, typed, family):
    with pytest.raises(RowError) as caught:
        family(name)[0].conversations(messages_of(("user", f"see {typed} here"), ("assistant", "two")))
    assert typed in caught.value.reason and "image" in caught.value.fix


def test_the_image_placeholder_of_other_kits_is_rejected_where_it_is_only_characters():
    row = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}], "images": ["a.png"]}
    with pytest.raises(RowError, match="message 0 has <image> in its text, which is only characters here"):
        normalise(row)


def test_a_user_who_spells_a_plain_header_is_not_trained(family):
    turns = ("user", "one ASSISTANT: no USER: x"), ("assistant", "two")
    assert_labels("llava", *family("llava"), messages_of(*turns), expected("llava", *turns))


# ---- templates of every behaviour that real ones have ----

LOOP = "{% for m in messages %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ TEXT }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}" \
    "<|im_start|>assistant\n{% endif %}"
STRING = CHATML.replace("TEXT", "'' + m.content")  # raises for a list
PARTS = CHATML.replace("TEXT", "m.content | map(attribute='text') | join")  # a string's characters have no text
BOTH = CHATML.replace("TEXT", "(m.content if m.content is string else m.content | map(attribute='text') | join)")
MULTI = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
CHAT = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n" \
    "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n«four<|im_end|>»\n"
THOUGHT = CHATML.replace("TEXT", "('<think></think>' if m.role == 'assistant' and loop.last else '') + m.content")

TEMPLATES = {  # name: (Jinja, the texts of the samples of MULTI with «»)
    "strings and typed parts alike": (BOTH, [CHAT]),
    "typed content raises": (STRING, [CHAT]),
    "typed content is dropped": (CHATML.replace("TEXT", "m.content if m.content is string"), [CHAT]),
    "typed content is printed as a Python list": (CHATML.replace("TEXT", "m.content"), [CHAT]),
    "typed content is printed as JSON": (
        CHATML.replace("TEXT", "(m.content if m.content is string else m.content | tojson)"), [CHAT]),
    "typed content is printed as JSON in several lines": (
        CHATML.replace("TEXT", "(m.content if m.content is string else m.content | tojson(indent=2))"), [CHAT]),
    "typed content of the assistant alone is dropped": (
        CHATML.replace("TEXT", "(m.content if m.content is string else m.content[0].text if m.role == 'user')"), [CHAT]),
    "strings are dropped": (PARTS, [CHAT]),
    "content is trimmed": (STRING.replace("m.content", "m.content | trim"), [CHAT]),
    "no newline after the end of turn": (STRING.replace("<|im_end|>\n", "<|im_end|>"), [CHAT.replace("»\n", "»").replace(
        "one<|im_end|>\n", "one<|im_end|>").replace("three<|im_end|>\n", "three<|im_end|>")]),
    "a space stands before each reply": (
        "{% for m in messages %}{{ m.role }}: {{ '' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        ["user: one<|im_end|>assistant:« two<|im_end|>»user: three<|im_end|>assistant:« four<|im_end|>»"]),
    "an empty thought opens each reply": (
        STRING.replace("{{ '' +", "{{ ('\n<think></think>\n' if m.role == 'assistant' else '') +"),
        [CHAT.replace("«", "«\n<think></think>\n")]),
    "an empty thought opens the last reply only": (THOUGHT, [
        CHAT.replace("«two<|im_end|>»", "two<|im_end|>").replace("«four", "«<think></think>four"),
        CHAT.split("<|im_start|>user\nthree")[0].replace("«", "«<think></think>")]),
    "an eos stands at the very end": (
        STRING.replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add"),
        [CHAT + "<|endoftext|>"]),
    "the prompt opens a thought that no finished turn has": (
        STRING.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif"), [CHAT]),
    "no generation prompt": (  # then the model has to write the header as well
        STRING.split("{% if add")[0], [CHAT.replace("<|im_start|>assistant\n«", "«<|im_start|>assistant\n")]),
    "turns end with two tokens, and generation at the second": (
        STRING.replace("}}<|im_end|>", "}}<|im_start|><|im_end|>"),
        [CHAT.replace("one<", "one<|im_start|><").replace("two<", "two<|im_start|><").replace(
            "three<", "three<|im_start|><").replace("four<", "four<|im_start|><")]),
    "turns end with nothing": (
        LOOP + "{{ m.role }}: {{ '' + m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        ["user: one\nassistant: «two<|im_end|>»\nuser: three\nassistant: «four<|im_end|>»\n"]),
    "turns end with the next one's header, at which generation stops": (
        LOOP + "{{ '<|endoftext|>' if m.role == 'user' else '<|im_start|>' }}{{ '' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        ["<|endoftext|>one<|im_start|>«two<|endoftext|>»three<|im_start|>«four<|endoftext|>»"]),
}


@pytest.fixture
def chatml(zoo):
    """A function: Jinja -> (template, encoder) of a text-only checkpoint that has it; it stops at two tokens."""
    def chatml(jinja: str) -> tuple[Template, Encoder]:
        tokenizer = load_processor(zoo("qwen_text"))
        tokenizer.chat_template = jinja
        return Template(tokenizer, ("<|im_end|>", "<|endoftext|>")), Encoder.of(tokenizer, registry.family_of("qwen2"))
    return chatml


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_any_behaviour_gives_exact_labels(name, chatml):
    jinja, wanted = TEMPLATES[name]
    template, encoder = chatml(jinja)
    conversations = template.conversations(messages_of(*MULTI))
    assert [c.text for c in conversations] == [text.replace("«", "").replace("»", "") for text in wanted]
    for conversation, marked in zip(conversations, wanted):
        encoded = encoder.encode(conversation.text, conversation.spans, [])
        ids, labels = expected_tokens(encoder.processor, marked)
        assert encoded["input_ids"].tolist() == [ids]
        assert encoded["labels"].tolist() == [labels]


def test_ends_that_the_kit_adds_are_counted(chatml):
    without_end, header_ends, _ = (chatml(TEMPLATES[name][0])[0] for name in (
        "turns end with nothing", "turns end with the next one's header, at which generation stops", "content is trimmed"))
    assert without_end.conversations(messages_of(*MULTI))[0].ends_added == 2
    assert header_ends.conversations(messages_of(*MULTI))[0].ends_added == 1  # the first reply's is there already


@pytest.mark.parametrize("jinja, turns, reason", [
    pytest.param(STRING.replace("m.content", "m.content | upper"), MULTI,
                 "the chat template drops or changes this text: 'one'", id="changes every text"),
    pytest.param(STRING.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)"), MULTI,
                 "the chat template's finished turn is not its prompt, the assistant's text and an end", id="changes replies"),
    pytest.param(STRING.replace("messages", "messages[1:]"), (("system", "a"), *MULTI),
                 "the chat template drops or changes this text: 'a'", id="drops the system text, a letter of other texts"),
    pytest.param("{{ raise_exception('roles\nmust alternate') }}", MULTI,
                 "the chat template refuses this conversation: roles must alternate", id="raises"),
    pytest.param("{{ messages[99].content | length }}", MULTI, "the chat template refuses this conversation: …", id="fails"),
])
def test_a_template_whose_labels_would_be_guessed_is_a_reject_by_name(jinja, turns, reason, chatml):
    with pytest.raises(RowError) as caught:
        chatml(jinja)[0].conversations(messages_of(*turns))
    assert caught.value.reason.startswith(reason.rstrip("…")) and "chat_template" in caught.value.fix


def test_a_system_text_that_moves_to_the_last_question_gives_each_reply_its_own_sample(chatml):
    jinja = "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in messages[1:] %}" \
        "{{ m.role }}: {{ messages[0].content + ' ' if m == last }}{{ m.content }}<|im_end|>{% endfor %}" \
        "{% if add_generation_prompt %}assistant: {% endif %}"
    found = chatml(jinja)[0].conversations(messages_of(("system", "Be brief."), *MULTI))
    assert [marked(c) for c in found] == [
        "user: one<|im_end|>assistant: two<|im_end|>user: Be brief. three<|im_end|>assistant: «four<|im_end|>»",
        "user: Be brief. one<|im_end|>assistant: «two<|im_end|>»"]


def marked(conversation) -> str:
    """A conversation's text with «» around its spans."""
    text = conversation.text
    for start, end in reversed(conversation.spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


def test_a_row_that_the_template_refuses_changes_nothing_for_the_rows_after_it(family):
    template, encoder = family("qwen2_5_vl")
    with pytest.raises(RowError):
        template.conversations(messages_of(("user", "<|im_end|>"), ("assistant", "two")))
    jinja = encoder.processor.chat_template
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + jinja
    encoder.processor.chat_template = strict
    try:
        template = Template(encoder.processor)
        with pytest.raises(RowError, match="refuses this conversation: no"):
            template.conversations(messages_of(("assistant", "two")))
        turns = ("user", "▣What is it?"), ("assistant", "A cat.")
        assert_labels("qwen2_5_vl", template, encoder, messages_of(*turns), expected("qwen2_5_vl", *turns))
    finally:
        encoder.processor.chat_template = jinja


def test_a_template_that_shows_fewer_pictures_than_the_row_has_is_a_reject(family):
    template, encoder = family("llava")
    jinja = encoder.processor.chat_template
    encoder.processor.chat_template = jinja.replace("message.role == 'user'", "false")
    encoder.processor.chat_template = jinja.replace("'<image>\\n'", "'' if message.role == 'assistant' else '<image>\\n'")
    encoder.processor.chat_template = "{% for m in messages %}{{ '<image>' if m.role == 'user' }}" \
        "{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    try:
        with pytest.raises(RowError, match="^2 images in the messages, 1 in the chat template's render$"):
            Template(encoder.processor).conversations(messages_of(("user", "▣▣one"), ("assistant", "two")))
    finally:
        encoder.processor.chat_template = jinja


def test_a_picture_for_a_model_without_pictures_is_a_reject(family):
    with pytest.raises(RowError, match=r"message 0 \(user\) has an image, and base_model takes none"):
        family("llama_text")[0].conversations(messages_of(("user", "▣one"), ("assistant", "two")))


@pytest.mark.parametrize("turns", [(("user", "one"),), (("user", "one"), ("assistant", "")), (("user", "one"), ("assistant", " \n")),
                                   (("user", "one"), ("assistant", "▣"))])
def test_a_row_without_a_reply_has_nothing_to_learn(turns, family):
    with pytest.raises(RowError, match="nothing to learn: no assistant message has a text"):
        family("llava")[0].conversations(messages_of(*turns))


def test_a_template_that_is_no_jinja_stops_with_its_line(chatml):
    with pytest.raises(StageError, match="chat_template: line 2: "):
        chatml("{{ messages }}\n{% for %}")


# ---- a tokenizer that merges across the seam of prompt and reply ----


def test_a_reply_that_starts_with_a_newline_is_tokenized_as_inference_does(family):
    template, encoder = family("qwen2_5_vl")
    tokenizer = tokenizer_of(encoder.processor)
    assert "ĊĊ" in tokenizer("assistant\n\nYes").tokens()  # the trap is there
    turns = ("user", "▣Is it?"), ("assistant", "\nYes"), ("user", "▣Sure?"), ("assistant", "\n\nYes")
    assert_labels("qwen2_5_vl", template, encoder, messages_of(*turns), expected("qwen2_5_vl", *turns))


def test_token_types_stay_with_the_picture_where_a_reply_is_tokenized_apart(family):
    template, encoder = family("gemma3")
    jinja = encoder.processor.chat_template
    encoder.processor.chat_template = jinja.replace(" | trim", "")
    try:
        turns = ("user", "▣Is it?"), ("assistant", "\nYes")
        (conversation,) = Template(encoder.processor).conversations(messages_of(*turns))
        encoded = encoder.encode(conversation.text, conversation.spans, [picture()])
        assert_labels("gemma3", Template(encoder.processor), encoder, messages_of(*turns), expected("gemma3", *turns))
    finally:
        encoder.processor.chat_template = jinja
    tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert encoded["token_type_ids"].tolist() == [[int(token == "<image_soft_token>") for token in tokens]]
    assert encoded["attention_mask"].shape == encoded["input_ids"].shape == encoded["labels"].shape


@pytest.fixture(scope="module")
def merging():
    """A tokenizer trained to merge ":" with the newlines after it, as large vocabularies do; its eos is <end>."""
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<end>"], show_progress=False)
    backend.train_from_iterator(["assistant:\n\nYes", "user: one", ":\n\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def test_a_colon_and_newlines_that_merge_are_tokenized_apart(merging):
    merging.chat_template = LOOP + "{{ m.role }}:{{ '' + m.content }}<end>{% endfor %}" \
        "{% if add_generation_prompt %}assistant:{% endif %}"
    assert any(":" in token and "\n" in token for token in merging.tokenize("assistant:\n\nYes"))  # the trap is there
    encoder = Encoder.of(merging, registry.family_of("llama"))
    (conversation,) = Template(merging).conversations(messages_of(("user", "one"), ("assistant", "\n\nYes")))
    encoded = encoder.encode(conversation.text, conversation.spans, [])
    ids, labels = expected_tokens(merging, "user:one<end>assistant:«\n\nYes<end>»")
    assert encoded["input_ids"].tolist() == [ids] and encoded["labels"].tolist() == [labels]
    assert merging.decode(ids) == conversation.text


def test_the_prompt_for_an_answer_ends_where_the_reply_starts(family, tmp_path):
    template, encoder = family("llava")
    picture().save(tmp_path / "a.png")
    (conversation,) = template.conversations(messages_of(("user", "▣one"), ("assistant", "two"), ("user", "▣three"),
                                                         ("assistant", " four \n")))
    medium = {"kind": "image", "path": str(tmp_path / "a.png"), "bytes": None, "sha256": "", "width": 32, "height": 32}
    spans = [{"start": start, "end": end} for start, end in conversation.spans]
    text, images, reply = encoder.prompt({"text": conversation.text, "spans": spans, "media": [medium, medium]})
    assert text.endswith("three ASSISTANT:") and len(images) == 2 and reply == "four"

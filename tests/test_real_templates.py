"""Every real chat template gives exact labels or a reject by name: never a mask that trains something else.

The templates are those of two public packages (tests/fetched.py), each with a tokenizer of bytes and of the
special tokens that it writes. What is expected knows nothing of lib/text/template.py: each reply of a row has to
be trained once, behind what models write before one (OPENING) and before what ends a turn in that template
(ENDS), and nothing else may be.
"""

import copy
import functools
import importlib
import itertools
import re
from collections import Counter

import pytest
from PIL import Image
from transformers.utils import chat_template_utils

from lib import registry
from lib.collator import IGNORE_INDEX
from lib.data.messages import text_parts
from lib.run.errors import RowError
from lib.text.chat import Encoder
from lib.text.processor import tokenizer_of
from lib.text.render import stop_clock
from lib.text.template import Template
from tests import fetched
from tests.zoo import VARIANTS
from tests.zoo.vocabulary import gpt_like

PACKAGES = {"axolotl": 36, "trl": 72}  # how many templates each has
ALL = sum(PACKAGES.values())
DAY = "2025-03-09"
ENDS = {  # what ends a turn: the templates that end it so, by the start of their names
    "<|im_end|>": "chatml falcon_h1 lfm2 nemotron phi_4 qwen",
    "<|eot_id|>": "llama3",
    "<|eot|>": "llama4 muse_glimmer",
    "<end_of_turn>": "gemma gemma3 gemma3n",
    "<turn|>": "gemma4 diffusion_gemma",
    "<end_of_utterance>": "idefics3 smolvlm",
    "<|end|>": "phi3 phi_3",
    "</s>": "alpaca llava metharme mistral pixtral",  # which write the tokenizer's eos, llava none at all
    "<｜end▁of▁sentence｜>": "deepseek",
    "[|endofturn|]": "exaone",
    "<|eom|>": "jamba",
    "<|return|>": "gptoss",
    "<|user|>": "glm4moe",  # the next turn's header
    "<|END_OF_TURN_TOKEN|>": "aya cohere",
    "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>": "cohere2 command_a",
}
SEEING = {  # a variant of the zoo: the templates that show pictures to its processor
    "gemma3": "gemma3", "gemma3n": "gemma3n", "gemma4_e2b": "gemma4 diffusion_gemma",
    "mllama": "llama3_2_vision", "llama4": "llama4", "llava": "llava llava_next", "pixtral": "pixtral",
    "mistral3": "mistral_v7_tekken", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl", "qwen3_5": "qwen3_5 qwen3_6 qwen3_8", "smolvlm2": "smolvlm idefics3",
    "lfm2_vl": "lfm2_2_5_vl",
}
TOKEN = re.compile(  # how these templates spell the tokens that they write
    r"<\|[^|<>\n'\"+ ]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_\w+>|<image>|<\|\w+>|<\w+\|>|\[gMASK\]|<sop>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)\]|\[\|\w+\|\]")
# What some models write before a reply: an empty thought or its end, a channel, spaces.
OPENING = re.compile(r"(<\|channel\|>final<\|message\|>| to=user<\|message\|>|<\|START_RESPONSE\|>)?"
                     r"\s*(<think>)?\s*(</think>)?\s*")

NO_SYSTEM = "System role not supported"  # the Gemmas'
DROPPED = "the chat template drops or changes this text: 'Be brief.'"  # where an assistant speaks last
UNCLEAR = "the chat template's finished turn isn't its prompt, the reply's text and an end"
NO_QUESTION = "No user query found in messages."
THOUGHT, OTHER = "<think>\nbecause\n</think>\n\nyes", "<think>\nso\n</think>\n\nno"
CHATS = {  # system, user, assistant, user …; how many templates reject it, by the reason's end
    "one turn": (["", "What is a red fox?", "An animal."], {}),
    "many turns": (["", "one", "two", "three", "four", "five", "six"], {}),
    "a question left open": (["", "one", "two", "three"], {}),
    "a system prompt": (["Be brief.", "What is it?", "A cat.", "And here?", "Another."],
                        {NO_SYSTEM: 3, DROPPED: 3}),
    "a system prompt and a question left open": (["Be brief.", "What is it?", "A cat.", "And here?"],
                                                 {NO_SYSTEM: 3, DROPPED: 3}),
    "letters of several bytes": (["", "é 😀", "日本 😀 é", "どこ", "東京🗼です"], {}),
    "spaces and newlines around texts": (["", " one\n", "\n two \n", "\tthree", "  four\n\n"], {}),
    "headers of plain characters": (["", "x\nassistant\nUSER: ASSISTANT: no\n\n### Response:\nno", "yes",
                                     "User: no\nmodel\nno", "Assistant: yes"], {}),
    "replies that repeat the question": (["", "same", "same", "same", "same"], {}),
    "markup": (["", "{{ x }} {% if %}", "<b>&amp;</b> {'type': 'text'}", "[1, 2]", '{"a": "b"}'], {}),
    "an empty reply": (["", "one", "", "three", "four"], {UNCLEAR: 1}),
    "thoughts": (["", "one", THOUGHT, "three", OTHER], {UNCLEAR: 11}),
    "half a thought": (["", "one", "because</think>yes", "three", "no </think> no"], {UNCLEAR: 25}),
    "a tool's words": (["", "<tool_response>\n1\n</tool_response>", "one", "two",
                        "<tool_call>\n{}\n</tool_call>"], {NO_QUESTION: 8}),
}


@functools.cache
def templates() -> dict[str, str]:
    """{package/name: Jinja} of every template."""
    return {f"{package}/{name}": jinja for package in PACKAGES
            for name, jinja in fetched.templates(package).items()}


def by_start(table: dict[str, str], name: str) -> str | None:
    """The key whose words hold the longest start of a template's name."""
    fitting = [(len(start), key) for key, starts in table.items() for start in starts.split()
               if name.split("/")[1].startswith(start)]
    return max(fitting)[1] if fitting else None


@functools.cache
def template_of(name: str) -> Template:
    """A template with a tokenizer whose eos is what ends a turn in it."""
    *_, end = TOKEN.findall(by_start(ENDS, name))
    header_ends_turn = end == "<|user|>"
    eos = "<|endoftext|>" if header_ends_turn else end
    tokens = sorted({"<bos>", eos, *TOKEN.findall(templates()[name])})
    tokenizer = gpt_like(first=tuple(tokens), bos_token="<bos>", eos_token=eos)
    tokenizer.chat_template = templates()[name]
    return Template(tokenizer, (end,) if header_ends_turn else (), DAY)


def messages_of(system: str, *texts: str, pictures: int = 0) -> list[dict]:
    """A conversation, with so many pictures before each question."""
    turns = []
    for number, text in enumerate(texts):
        media = [{"type": "image"}] * (pictures if number % 2 == 0 else 0)
        turns.append({"role": ("user", "assistant")[number % 2], "content": [*media, *text_parts(text)]})
    return [{"role": "system", "content": text_parts(system)}, *turns] if system else turns


def trained_texts(template: Template, messages: list[dict], model_type: str = "") -> list[str]:
    """The runs of trained tokens of all samples of a row, decoded."""
    encoder, found = Encoder.of(template.processor, registry.family_of(model_type)), []
    for conversation in template.conversations(messages):
        pictures = [Image.new("RGB", (32, 32), "red")] * conversation.media
        labels = encoder.encode(conversation.text, conversation.spans, pictures)["labels"][0].tolist()
        assert not {*labels} & {*encoder.never_trained}
        runs = itertools.groupby(labels, key=lambda label: label != IGNORE_INDEX)
        found += [tokenizer_of(template.processor).decode(list(run)) for trained, run in runs if trained]
    return found


def is_exact(found: list[str], replies: list[str], end: str) -> bool:
    """Whether each reply is trained once, up to and including what ends its turn."""
    left = Counter(reply.strip() for reply in replies)
    for text in found:
        body = text.removesuffix(end)
        # The prompt may have opened the thought that the reply begins with.
        fits = [reply for reply in left for said in (reply, reply.removeprefix("<think>\n"))
                if body.strip().endswith(said) and OPENING.fullmatch(body.rstrip().removesuffix(said))]
        if body == text or not fits:
            return False
        left[max(fits, key=len)] -= 1
    return not any(left.values())


# ---- every template ----


def test_the_packages_have_as_many_templates_as_are_counted_here():
    assert Counter(name.split("/")[0] for name in templates()) == PACKAGES


@pytest.mark.parametrize("chat", CHATS)
def test_every_template_trains_exactly_the_replies_or_rejects_the_row_by_name(chat):
    (system, *texts), rejects = CHATS[chat]
    exact, wrong, rejected = [], [], Counter()
    for name in templates():
        try:
            found = trained_texts(template_of(name), messages_of(system, *texts))
        except RowError as reject:
            rejected[reject.reason.removeprefix("the chat template refuses this conversation: ")] += 1
            assert "chat_template" in reject.fix
            continue
        (exact if is_exact(found, texts[1::2], by_start(ENDS, name)) else wrong).append((name, found))
    assert not wrong
    assert len(exact) >= ALL - sum(rejects.values())
    assert rejected <= Counter(rejects)


def test_every_template_renders_plain_messages_as_transformers_own_method_does():
    def rendered(template: Template, messages: list[dict], prompt: bool) -> str:
        try:
            return template.render(messages, prompt)
        except RowError as reject:
            return reject.reason
    for name in templates():
        ours = template_of(name)
        theirs = copy.copy(ours)
        theirs.is_usual = False
        assert ours.is_usual
        for (system, *texts), _ in CHATS.values():
            messages = messages_of(system, *texts)
            for prompt in (False, True):
                assert rendered(ours, messages, prompt) == rendered(theirs, messages, prompt)


def test_every_template_rejects_a_row_whose_user_spells_what_ends_a_turn():
    for name in templates():
        (end, *_), template = TOKEN.findall(by_start(ENDS, name)), template_of(name)
        with pytest.raises(RowError) as caught:
            template.conversations(messages_of("", f"one{end}\nassistant: no", "two"))
        assert caught.value.reason == f"message 0 (user) spells the special token {end!r}", name


# ---- the ways in which real templates differ, each by one of them ----

IM = "<|im_start|>{}\n{}<|im_end|>\n"
USER, SYSTEM = functools.partial(IM.format, "user"), functools.partial(IM.format, "system")
FOUR = ["Be brief.", "one", "two", "three", "\n four \n"]
BEHAVIOURS = {  # name: (template, the texts of the samples of FOUR, with «» around what is trained)
    "spans by subtraction": ("trl/qwen3_vl", [
        SYSTEM("Be brief.") + USER("one") + "<|im_start|>assistant\n«two<|im_end|>»\n" + USER("three")
        + "<|im_start|>assistant\n«\n four \n<|im_end|>»\n"]),
    "earlier thoughts are dropped": ("trl/qwen3", [
        SYSTEM("Be brief.") + USER("one") + IM.format("assistant", "two") + USER("three")
        + "<|im_start|>assistant\n«<think>\n\n</think>\n\n four \n<|im_end|>»\n",
        SYSTEM("Be brief.") + USER("one")
        + "<|im_start|>assistant\n«<think>\n\n</think>\n\ntwo<|im_end|>»\n"]),
    "the prompt opens a thought": ("trl/qwen3_5_think_training", [
        SYSTEM("Be brief.") + USER("one") + "<|im_start|>assistant\n<think>\n«\n</think>\n\ntwo<|im_end|>»\n"
        + USER("three") + "<|im_start|>assistant\n<think>\n«\n</think>\n\nfour<|im_end|>»\n"]),
    "the prompt opens what no finished turn has": ("trl/deepseekv3", [
        "<bos>Be brief.<｜User｜>one<｜Assistant｜>«two<｜end▁of▁sentence｜>»"
        "<｜User｜>three<｜Assistant｜>«\n four \n<｜end▁of▁sentence｜>»"]),
    "an eos only at the very end": ("axolotl/metharme", [
        "<bos><|system|>Be brief.<|user|>one<|model|>two<|user|>three<|model|>«four</s>»",
        "<bos><|system|>Be brief.<|user|>one<|model|>«two</s>»"]),
    "an eos behind the end of turn": ("trl/phi3", [
        "<|system|>\nBe brief.<|end|>\n<|user|>\none<|end|>\n<|assistant|>\n«two<|end|>»\n"
        "<|user|>\nthree<|end|>\n<|assistant|>\n«\n four \n<|end|>»\n<|end|>"]),
    "typed parts printed as a list": ("trl/llama3", [
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»"]),
    "typed parts dropped": ("trl/qwen3_instruct_2507", [
        SYSTEM("Be brief.") + USER("one") + "<|im_start|>assistant\n«two<|im_end|>»\n" + USER("three")
        + "<|im_start|>assistant\n«\n four \n<|im_end|>»\n"]),
    "typed parts refused": ("axolotl/chatml", [
        SYSTEM("Be brief.") + USER("one") + "<|im_start|>assistant\n«two<|im_end|>»\n" + USER("three")
        + "<|im_start|>assistant\n«\n four \n<|im_end|>»\n"]),
    "content trimmed": ("axolotl/gemma3", [
        "<bos><start_of_turn>user\nBe brief.\n\none<end_of_turn>\n<start_of_turn>model\n«two<end_of_turn>»\n"
        "<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n«four<end_of_turn>»\n"]),
    "no end of turn": ("axolotl/llava", [
        "Be brief. USER: one ASSISTANT:« two</s>» USER: three ASSISTANT:« \n four \n</s>» "]),
    "the next header ends a turn": ("trl/glm4moe", [
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\none<|assistant|>«\n<think></think>\ntwo<|user|>»\n"
        "three<|assistant|>«\n<think></think>\nfour<|user|>»"]),
    "a space before each reply": ("trl/smolvlm", [
        "<|im_start|>System: Be brief.<end_of_utterance>\nUser: one<end_of_utterance>\n"
        "Assistant:« two<end_of_utterance>»\nUser: three<end_of_utterance>\n"
        "Assistant:« \n four \n<end_of_utterance>»\n"]),
    "a date in the prompt": ("trl/llama3_2", [
        "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 09 Mar 2025\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»"]),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_real_template_of_each_behaviour_gives_the_samples_written_by_hand(behaviour):
    name, wanted = BEHAVIOURS[behaviour]
    found = template_of(name).conversations(messages_of(*FOUR))
    assert [marked(conversation) for conversation in found] == wanted


def marked(conversation) -> str:
    """A conversation's text with «» around its spans."""
    text = conversation.text
    for start, end in reversed(conversation.spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


# ---- pictures ----


@functools.cache
def seeing(variant: str):
    """The processor of a variant of the zoo, and its model type."""
    module = next(module for module, names in VARIANTS.items() if variant in names)
    parts = getattr(importlib.import_module(f"tests.zoo.{module}"), variant)()
    return parts.processor, parts.config.model_type


def test_every_template_with_pictures_trains_exactly_the_replies(monkeypatch):
    texts, exact = ("What is it?", "A cat.", "x\nassistant\nno", " Another \n"), []
    for name in templates():
        if variant := by_start(SEEING, name):
            (processor, model_type), end = seeing(variant), by_start(ENDS, name)
            monkeypatch.setattr(processor, "chat_template", templates()[name])
            messages = messages_of("", *texts, pictures=1)
            found = trained_texts(Template(processor, (end,), DAY), messages, model_type)
            assert is_exact(found, texts[1::2], end), (name, found)
            exact.append(name)
    assert len(exact) >= 39


def test_every_template_without_pictures_rejects_a_row_with_one(monkeypatch):
    processor, _ = seeing("qwen2_vl")
    reasons = ("1 image in the messages, 0 in the render", "the chat template refuses this conversation: ",
               "the chat template drops or changes this text: 'one'")
    for name in (name for name in templates() if by_start(SEEING, name) is None):
        monkeypatch.setattr(processor, "chat_template", templates()[name])
        with pytest.raises(RowError) as caught:
            Template(processor, day=DAY).conversations(messages_of("", "one", "two", pictures=1))
        assert caught.value.reason.startswith(reasons), name


# ---- the clock ----


@pytest.fixture
def on_day(monkeypatch):
    """A function: an ISO date -> from now on, transformers tells templates that it is this day."""
    def on_day(day: str):
        class Clock(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)
        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return on_day


TELL_THE_DAY = ["axolotl/llama3_2_vision", "axolotl/mistral_v7_tekken", "trl/gptoss", "trl/gptoss_training",
                "trl/llama3_2", "trl/muse_glimmer", "trl/muse_glimmer_training"]


def test_a_template_that_tells_the_day_gives_the_same_samples_on_any_day(on_day):
    told, messages = [], messages_of("", "one", "two")
    for name in templates():
        pinned, free = template_of(name), Template(template_of(name).processor)
        renders = {}
        for day in (DAY, "2026-12-31", "2028-02-29"):
            on_day(day)
            renders[day] = free.render(messages)
            assert pinned.render(messages) == renders[DAY], name  # to the letter what it says on that day
        (conversation, *_) = pinned.conversations(messages)
        assert conversation.tells_day == (len({*renders.values()}) > 1), name
        told += [name] * conversation.tells_day
    assert told == TELL_THE_DAY


@pytest.mark.parametrize("name", TELL_THE_DAY)
def test_a_template_whose_clock_is_stopped_renders_in_plain_transformers_as_in_training(name, on_day, monkeypatch):
    processor = template_of(name).processor
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    tool = {"type": "function", "function": {"name": "look", "description": "It looks.", "parameters": {
        "type": "object", "properties": {"at": {"type": "string", "description": "where"}}, "required": ["at"]}}}
    marked = "generation %}" in templates()[name]
    options = {"return_dict": True, "return_assistant_tokens_mask": marked, "tokenize": True}
    monkeypatch.setattr(processor, "chat_template", templates()[name])        # put back after the test
    on_day(DAY)
    own = [processor.apply_chat_template(messages, tools=tools, **options) for tools in (None, [tool])]
    assert (own[0] != own[1]) == ("tools" in templates()[name])
    stop_clock(processor, DAY)
    for day in ("2026-12-31", "2028-02-29"):
        on_day(day)
        found = [processor.apply_chat_template(messages, tools=tools, **options) for tools in (None, [tool])]
        assert found == own
        assert not marked or all(any(each["assistant_masks"]) for each in found)


def test_whatever_a_template_asks_of_the_clock_it_gets_what_strftime_would_say(on_day, monkeypatch):
    on_day("2026-03-05")
    asked = "{{ strftime_now('%A %a %B %b %d %-d %m %-m %Y %y %F %j %H:%M:%S %p %x %U %%') }}"
    processor, _ = seeing("qwen2_vl")
    monkeypatch.setattr(processor, "chat_template", asked + "{{ messages[0].content[0].text }}")
    messages = messages_of("", "one")
    free, stopped = (Template(processor, day=day).render(messages) for day in (None, "2026-03-05"))
    assert stopped == free
    assert stopped.startswith("Thursday Thu March Mar 05 5 03 3 2026 26 2026-03-05 064 00:00:00")


# ---- what a template says by itself ----


@pytest.mark.parametrize("name, system, words", [
    ("trl/qwen2_5_vl", "", ("system\nYou are a helpful assistant.",)),
    ("trl/qwen2_5_vl", "Be brief.", ()),
    ("trl/llama3_2", "", ("Cutting Knowledge Date: December 2023\nToday Date: 09 Mar 2025",)),
    ("trl/llama3_2", "Be brief.", ("Cutting Knowledge Date: December 2023\nToday Date: 09 Mar 2025",)),
    ("trl/qwen3", "", ("assistant\n<think>\n\n</think>",)),
    ("axolotl/alpaca", "", ("### Instruction:", "### Response:")),
    ("trl/gemma3", "Be brief.", ()), ("axolotl/llava", "Be brief.", ()), ("trl/smolvlm", "", ()),
])
def test_what_a_template_says_by_itself_is_told(name, system, words):
    (conversation,) = template_of(name).conversations(messages_of(system, "one", "two"))
    assert conversation.put_in == words

"""Counts of tokens that are had without the tensors are those of the tensors, for every family and any size of picture."""

import functools
import random

import numpy as np
import pytest
from PIL import Image

from lib import registry
from lib.collator import IGNORE_INDEX
from lib.data.counting import ENOUGH, TokenCounter, quick_counts
from lib.models.plan import load_config
from lib.text.chat import Encoder
from lib.text.processor import complete, load_processor, stop_tokens
from lib.text.spans import covered, spans_of_tokens, straddled
from lib.text.template import Conversation, Template
from tests import zoo as variants
from tests.test_labels import PICTURE, chat

COUNTED = [name for name in variants.NAMES if name != "paligemma"]    # whose prompts and replies are tokenized apart
SEEING = [name for name in COUNTED if name not in (*variants.TEXT_ONLY, "voxtral")]
# Where transformers tells how many tokens a picture is; elsewhere, each size is seen once.
TOLD = ("llava", "gemma3", "gemma3n", "gemma4_e2b", "gemma4_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
        "qwen3_5_moe", "glm4v", "glm46v", "glm4v_moe", "internvl")
USUAL = [(64 + 3 * n, 40 + 5 * n % 23) for n in range(8)]                                   # 64 to 85, 40 to 62
ODD = [(1, 1), (20, 20), (31, 33), (640, 480), (120, 90), (90, 120), (8, 321), (700, 3)]


@pytest.fixture(scope="module")
def subject(zoo):
    """A function: a variant's name -> its encoder, a row's conversation with one picture, and one with two."""
    @functools.cache
    def subject(name: str) -> tuple[Encoder, Conversation, Conversation]:
        family = registry.family_of(load_config(str(zoo(name)), None, False).model_type)
        processor = complete(load_processor(zoo(name)), family)
        template = Template(processor, stop_tokens(zoo(name), processor))
        (one,) = template.conversations(chat(f"{PICTURE}What is it?", "a red fox"))
        return Encoder.of(processor, family), one, template.conversations(chat(f"{PICTURE} or {PICTURE}?", "an owl"))[0]
    return subject


def pictures(*sizes) -> list[Image.Image]:
    return [Image.new("RGB", size, "red") for size in sizes]


def measured(encoder, conversation, sizes) -> tuple | None:
    """What the tensors say; None where there can be none."""
    try:
        encoded = encoder.encode(conversation.text, conversation.spans, pictures(*sizes))
    except (ValueError, RuntimeError):
        return None
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0, 1:]
    return len(ids), int((labels != IGNORE_INDEX).sum()), sum(i in encoder.never_trained for i in ids)


@pytest.mark.parametrize("name", SEEING)
def test_counts_of_rows_with_pictures_of_any_size_are_those_of_their_tensors(name, subject):
    encoder, one, two = subject(name)
    counter = TokenCounter(encoder)
    rows = [(one, [size]) for size in USUAL + ODD + USUAL] + [(two, [first, last]) for first, last in zip(ODD, USUAL)]
    found = [counter.row(talk.text, talk.spans, pictures(*sizes)) for talk, sizes in rows]
    assert found == [measured(encoder, talk, sizes) for talk, sizes in rows]
    assert sum(map(bool, found)) > 24


@pytest.mark.parametrize("name", SEEING)
def test_a_picture_is_prepared_once_for_its_size_and_seldom_where_the_number_is_told(name, subject, monkeypatch):
    (encoder, one, _), prepared = subject(name), []
    process = Encoder.process
    monkeypatch.setattr(Encoder, "process", lambda *given: prepared.append(given[2][0].size) or process(*given))
    counter = TokenCounter(encoder)
    for size in USUAL + USUAL:
        assert counter.row(one.text, one.spans, pictures(size))
    assert prepared == (USUAL[:ENOUGH] if name in TOLD else USUAL)


def test_a_number_that_transformers_tells_wrong_is_not_believed(subject, monkeypatch):
    encoder, one, _ = subject("qwen2_5_vl")
    told = type(encoder.processor)._get_num_multimodal_tokens
    monkeypatch.setattr(type(encoder.processor), "_get_num_multimodal_tokens",
                        lambda self, image_sizes: told(self, image_sizes=[(56, 56) for _ in image_sizes]))
    counter = TokenCounter(encoder)
    for size in USUAL:
        assert counter.row(one.text, one.spans, pictures(size)) == measured(encoder, one, [size])


ODD_WORDS = ("plain", "été", "e\u0301te\u0301", "🦊🦊", "雪", "ﬁ Ǆ", "a\t\r\nb", "x  y", "don't", "1234", "\u200b")


@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_texts_are_those_of_their_tensors(name, zoo):
    family = registry.family_of(load_config(str(zoo(name)), None, False).model_type)
    processor = complete(load_processor(zoo(name)), family)
    template, encoder = Template(processor, stop_tokens(zoo(name), processor)), Encoder.of(processor, family)
    pick, counter = random.Random(0), TokenCounter(encoder)
    talks = [talk for _ in range(20) for talk in template.conversations(
        chat(*(" ".join(pick.choices(ODD_WORDS, k=5)).strip() for _ in range(2))))]
    found = counter.texts([(talk.text, talk.spans) for talk in talks])
    said = [measured(encoder, talk, []) for talk in talks]
    assert [each or wanted for each, wanted in zip(found, said)] == said
    assert len(list(filter(None, found))) > len(talks) / 2, counter.plain


def test_texts_that_their_tokens_spell_are_tokenized_without_offsets(subject, monkeypatch):
    encoder, one, _ = subject("qwen2_5_vl")
    counter, asked = TokenCounter(encoder), []
    given = [(text, [(0, len(text))]) for text in ("été 🦊", "e\u0301", "plain")]           # the second one becomes é
    tokens = TokenCounter._tokens

    def noted(self, texts, first, placed=True):
        asked.append((texts, placed))
        return tokens(self, texts, first, placed)
    monkeypatch.setattr(TokenCounter, "_tokens", noted)
    found = counter.texts(given)
    texts = [text for text, _ in given]
    assert asked == [(texts[:1], True), (texts, False), ([texts[1]], True)]               # the first one to see that all do
    counter.spelt = {}
    assert counter.texts(given) == found and asked[3:] == [(texts, True)]


def test_quick_counts_of_any_tokens_are_those_of_each_token_or_none():
    pick, told = random.Random(0), 0
    for _ in range(4000):
        offsets, place = [], 0
        for _ in range(pick.randint(1, 12)):
            gap, width = pick.choice((0, 0, 0, 1)), pick.choice((0, 1, 1, 2, 3) if pick.random() < 0.3 else (1, 2))
            offsets += [(place + gap, place + gap + width)] * pick.choice((1, 1, 1, 2))
            place += gap + width
        if pick.random() < 0.1:
            offsets.append((0, 0))
        ids = [pick.randrange(20) for _ in offsets]
        borders = sorted(pick.sample(range(place + 2), 2 * pick.randint(1, place // 3 + 1)))
        spans = list(zip(borders[::2], borders[1::2]))
        quick, tokens = quick_counts(ids, offsets, spans, frozenset((3, 7))), spans_of_tokens(offsets)
        if quick:
            trained = covered(tokens, spans, without=[]) & ~np.isin(ids, (3, 7))
            assert not straddled(tokens, spans)
            assert quick == (len(ids), trained[1:].sum(), sum(i in (3, 7) for i in ids))
            told += 1
    assert told > 500

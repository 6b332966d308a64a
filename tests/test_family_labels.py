"""What is trained, in every family, of the conversations that break labels elsewhere."""
import pytest

from lib.run.errors import RowError
from lib.text.processor import special_tokens, tokenizer_of
from tests.test_families import NAMES, REPLIES, SEEING, find, text


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def asked(subject, *content):
    """A user's turn, with a medium of the family's own kind where it takes any."""
    medium = [{"type": subject.kind}] if subject.name in SEEING else []
    return {"role": "user", "content": [*medium, *content]}


def encoded(subject, messages):
    """The rows of a conversation whose pictures are the test pictures."""
    samples = subject.template.conversations(messages)
    return [subject.encoder.encode(s.text, s.spans, subject.media(s.media)) for s in samples]


def squeezed(words):
    """A text without blanks, which templates put around replies or not."""
    return "".join(words.split())


def test_a_system_prompt_is_not_trained(subject):
    system = {"role": "system", "content": [text("Answer in one word, kumquat.")]}
    reply = {"role": "assistant", "content": [text("a red fox")]}
    try:
        (row,) = encoded(subject, [system, asked(subject, text("What is it?")), reply])
    except RowError as error:                    # some templates take none: said, and never trained otherwise
        assert "chat template" in error.reason
        return
    assert squeezed(subject.trained_text(row)) == squeezed(REPLIES[subject.name].format("a red fox"))


def test_a_medium_in_a_reply_is_not_trained(subject):
    if subject.name not in SEEING:
        pytest.skip("takes no media")
    reply = {"role": "assistant", "content": [text("see "), {"type": subject.kind}, text("a red fox")]}
    messages = [{"role": "user", "content": [text("Show me.")]}, reply]
    try:
        (row,) = encoded(subject, messages)
    except RowError as error:
        assert error.reason and error.fix
        return
    trained = [i for i in row["labels"][0].tolist() if i != -100]
    assert not set(trained) & set(subject.encoder.never_trained)
    words = squeezed(subject.trained_text(row))
    assert words.endswith(squeezed(REPLIES[subject.name].format("a red fox")).rpartition("</think>")[2])


def test_a_pad_id_that_is_the_eos_id_swallows_no_end_of_turn(subject):
    tokenizer = tokenizer_of(subject.processor)
    reply = {"role": "assistant", "content": [text("no")]}
    short, long = (encoded(subject, [asked(subject, text(words)), reply])[0] for words in ("No?", "No? " * 9))
    before, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        assert subject.encoder.pad_id == tokenizer.eos_token_id
        labels = subject.batch([short, long])["labels"]
    finally:
        tokenizer.pad_token = before
    assert labels[0][labels[0] != -100].tolist() == [i for i in short["labels"][0].tolist() if i != -100]
    assert (labels[0, short["labels"].shape[1]:] == -100).all() and labels.shape[1] > short["labels"].shape[1]


def test_a_user_who_spells_the_templates_marks_is_a_reject(subject):
    reply = {"role": "assistant", "content": [text("no")]}
    written = subject.template.render([asked(subject, text("x")), reply])
    marks = {found.group() for found in special_tokens(subject.processor).finditer(written)}
    assert marks
    for mark in sorted(marks):
        with pytest.raises(RowError, match="spells the special token"):
            subject.template.conversations([asked(subject, text(f"I write {mark} here")), reply])

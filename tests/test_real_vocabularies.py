"""Labels are exact with the vocabularies of published checkpoints: Qwen's, Llama-3's, Llama-4's and tekken.

Vocabularies and templates are fetched (tests/fetched.py). Each vocabulary gets its family's special tokens,
at the ids that they have in published checkpoints, and the family's processor, for small pictures.
"""

import base64
import functools
import itertools
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    Llama4Config,
    Llama4ImageProcessor,
    Llama4Processor,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral import convert_tekken_tokenizer

from lib import registry
from lib.collator import IGNORE_INDEX
from lib.data.messages import text_parts
from lib.run.errors import RowError
from lib.text.chat import Encoder
from lib.text.processor import tokenizer_of
from lib.text.template import Template
from tests import fetched
from tests.zoo.llama import SQUARE
from tests.zoo.mistral import PATCH
from tests.zoo.qwen import CLIPS, PICTURES
from tests.zoo.vocabulary import special

DAY = "2025-03-09"

# ---- the tokenizers --------------------------------------------------------------------------------------

O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
LLAMA3 = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
          "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008,
          "<|eot_id|>": 128009, "<|python_tag|>": 128010, "<|image|>": 128256}
LLAMA4 = {"<|begin_of_text|>": 200000, "<|end_of_text|>": 200001, "<|header_start|>": 200005,
          "<|header_end|>": 200006, "<|eom|>": 200007, "<|eot|>": 200008, "<|finetune_right_pad|>": 200018,
          "<|image_start|>": 200080, "<|image_end|>": 200081, "<|tile_x_separator|>": 200084,
          "<|tile_y_separator|>": 200085, "<|image|>": 200090, "<|patch|>": 200092}
TEKKEN = {"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12,
          "[IMG_END]": 13, "[SYSTEM_PROMPT]": 17, "[/SYSTEM_PROMPT]": 18}


class Ranks(TikTokenConverter):
    """transformers' converter, of a vocabulary's bytes: a line is a token in base64 and its rank."""

    @staticmethod
    def load_tiktoken_bpe(content: bytes) -> dict[bytes, int]:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def filled(ids: dict[str, int]) -> tuple[str, ...]:
    """The special tokens from the first id to the last; those that no test names are reserved ones."""
    names = {place: token for token, place in ids.items()}
    return tuple(names.get(place) or f"<|reserved_special_token_{place}|>"
                 for place in range(min(names), max(names) + 1))


@functools.cache
def qwen_tokenizer():
    """Qwen's tokenizer, as its converter in transformers would read it from a checkpoint."""
    def convert():
        content = fetched.content("dashscope", "dashscope/resources/qwen.tiktoken")
        vocabulary, merges = Ranks().extract_vocab_merges_from_model(content)
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>")
        special(tokenizer, filled(QWEN)).eos_token = "<|im_end|>"
        return tokenizer
    return fetched.converted("qwen", convert)


def llama_tokenizer(version: int, ids: dict[str, int], **named: str):
    """Llama-3's or Llama-4's tokenizer."""
    def convert():
        content = fetched.content("llama-models", f"llama_models/llama{version}/tokenizer.model")
        pattern = {"pattern": O200K} if version == 4 else {}
        backend = Ranks(content, extra_special_tokens=list(filled(ids)), **pattern).converted()
        named["bos_token"] = "<|begin_of_text|>"
        return PreTrainedTokenizerFast(tokenizer_object=backend, add_bos_token=True, **named)
    return fetched.converted(f"llama{version}", convert)


@functools.cache
def tekken_tokenizer():
    """Mistral's tokenizer."""
    def convert():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tekken.json"
            path.write_bytes(fetched.content("mistral-common", "mistral_common/data/tekken_240911.json"))
            return convert_tekken_tokenizer(str(path), chat_template="")
    return fetched.converted("tekken", convert)


# ---- the families ----------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A family with its real vocabulary and template."""

    processor: object
    model_type: str
    template: str  # package/name of its chat template
    ids: dict[str, int]
    end: str
    header: list[int]  # the ids that ask for a reply
    picture: dict[str, int]  # the media tokens of a picture with 32 x 32 pixels, and how many it has

    def __post_init__(self):
        package, name = self.template.split("/")
        self.processor.chat_template = fetched.templates(package)[name]
        self.given = Template(self.processor, (self.end,), DAY)
        self.encoder = Encoder.of(self.processor, registry.family_of(self.model_type))


def qwen2_5_vl() -> Subject:
    pictures = Qwen2VLImageProcessor(**PICTURES), Qwen2VLVideoProcessor(**PICTURES)
    processor = Qwen2_5_VLProcessor(pictures[0], qwen_tokenizer(), pictures[1])
    return Subject(processor, "qwen2_5_vl", "trl/qwen2_5_vl", QWEN, "<|im_end|>", [151644, 77091, 198],
                   {"<|vision_start|>": 1, "<|image_pad|>": 4, "<|vision_end|>": 1})


def qwen3_vl() -> Subject:
    pictures = Qwen2VLImageProcessor(**PICTURES), Qwen3VLVideoProcessor(**CLIPS)
    processor = Qwen3VLProcessor(pictures[0], qwen_tokenizer(), pictures[1])
    return Subject(processor, "qwen3_vl", "trl/qwen3_vl", QWEN, "<|im_end|>", [151644, 77091, 198],
                   {"<|vision_start|>": 1, "<|image_pad|>": 4, "<|vision_end|>": 1})


def mllama() -> Subject:
    tokenizer = llama_tokenizer(3, LLAMA3, eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>")
    processor = MllamaProcessor(MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)
    return Subject(processor, "mllama", "axolotl/llama3_2_vision", LLAMA3, "<|eot_id|>",
                   [128006, 78191, 128007, 271], {"<|image|>": 1})


def llama4() -> Subject:
    tokenizer = llama_tokenizer(4, LLAMA4, eos_token="<|eot|>", pad_token="<|finetune_right_pad|>")
    image_processor = Llama4ImageProcessor(size=SQUARE, max_patches=4)
    processor = Llama4Processor(image_processor, tokenizer, patch_size=8, pixel_shuffle_ratio=0.5)
    return Subject(processor, "llama4", "axolotl/llama4", LLAMA4, "<|eot|>", [200005, 140680, 200006, 368],
                   {"<|image_start|>": 1, "<|image|>": 1, "<|patch|>": 4, "<|image_end|>": 1})


def pixtral(template: str = "axolotl/pixtral", model_type: str = "llava", side_tokens: int = 1) -> Subject:
    image_processor = PixtralImageProcessor(size={"longest_edge": 32}, patch_size=PATCH)
    sizes = {"patch_size": 8, "spatial_merge_size": side_tokens}
    processor = PixtralProcessor(image_processor, tekken_tokenizer(), **sizes)
    rows = 4 // side_tokens
    return Subject(processor, model_type, template, TEKKEN, "</s>", [4],
                   {"[IMG]": rows * rows, "[IMG_BREAK]": rows - 1, "[IMG_END]": 1})


def mistral3() -> Subject:
    return pixtral("axolotl/mistral_v7_tekken", "mistral3", side_tokens=2)


FAMILIES = {make.__name__: make for make in (qwen2_5_vl, qwen3_vl, mllama, llama4, pixtral, mistral3)}


@functools.cache
def subject(name: str) -> Subject:
    """A family, made once for all tests."""
    return FAMILIES[name]()


def messages_of(*texts: str, system: str = "", pictures: int = 0) -> list[dict]:
    """The user and the assistant in turn, with so many pictures before each question."""
    messages = [{"role": "system", "content": text_parts(system)}] if system else []
    for number, text in enumerate(texts):
        media = [{"type": "image"}] * (pictures if number % 2 == 0 else 0)
        messages.append({"role": ("user", "assistant")[number % 2], "content": [*media, *text_parts(text)]})
    return messages


def encoded(family: Subject, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a row that makes one sample."""
    (conversation,) = family.given.conversations(messages)
    pictures = [Image.new("RGB", (32, 32), "red")] * conversation.media
    tensors = family.encoder.encode(conversation.text, conversation.spans, pictures)
    return tensors["input_ids"][0].tolist(), tensors["labels"][0].tolist()


def runs_of(labels: list[int]) -> list[tuple[int, list[int]]]:
    """[(where it starts, its ids)] of each run of trained tokens."""
    found = itertools.groupby(enumerate(labels), key=lambda item: item[1] != IGNORE_INDEX)
    runs = [list(run) for trained, run in found if trained]
    return [(run[0][0], [label for _, label in run]) for run in runs]


# ---- ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_have_the_ids_of_the_published_checkpoints(name):
    family = subject(name)
    tokenizer = tokenizer_of(family.processor)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in family.ids} == family.ids
    for token, place in family.ids.items():
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"].count(place) == 1


def test_these_ids_are_those_that_transformers_configurations_assume():
    qwen = Qwen2_5_VLConfig()
    assert (qwen.image_token_id, qwen.video_token_id) == (QWEN["<|image_pad|>"], QWEN["<|video_pad|>"])
    assert (qwen.vision_start_token_id, qwen.vision_end_token_id) == (151652, 151653)
    assert MllamaConfig().image_token_index == LLAMA3["<|image|>"]
    llama4 = Llama4Config()
    assert (llama4.boi_token_index, llama4.eoi_token_index) == (200080, 200081)
    assert llama4.image_token_index == LLAMA4["<|patch|>"] == 200092


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_of_a_picture_is_trained(name):
    family = subject(name)
    ids, labels = encoded(family, messages_of("What is it?", "A cat.", "And here?", "A dog.", pictures=1))
    media = {family.ids[token]: 2 * times for token, times in family.picture.items()}
    assert {place: ids.count(place) for place in media} == media
    assert not {*media} & {*labels}
    assert {*family.encoder.never_trained} <= {*family.ids.values()}


# ---- labels ----------------------------------------------------------------------------------------------

CHATS = {
    "one turn": ["What is a red fox?", "A small wild animal."],
    "many turns": ["One?", "1", "Two?", "2", "Three?", "3, and that is all."],
    "letters of several bytes": ["né 東京 🗼?", "Ça va: 日本 🇯🇵 👩‍👩‍👧 e\u0301", "ß", "🦊"],
    "spaces and newlines at the seams": [" one \n", "\n\nYes", "\tthree", "  four \n\n", "five", "\n"],
    "plain characters that look like markers": [
        "<|im_end |> [ INST] <|eot_id> </ s>\nassistant\n\nno", "im_end|> eot_id [/INST",
        "[/ INST]no", "yes"],
    "code and numbers": ["def f(x):\n    return x", "```python\nprint(3.14159)\n```\n1234567"],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pictures", [0, 2])
def test_exactly_the_replies_and_their_ends_are_trained(name, chat, pictures):
    family, texts = subject(name), CHATS[chat]
    ids, labels = encoded(family, messages_of(*texts, pictures=pictures))
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    runs = runs_of(labels)
    decode = functools.partial(tokenizer_of(family.processor).decode, clean_up_tokenization_spaces=False)
    expected = [unicodedata.normalize("NFC", reply) if "qwen" in name else reply for reply in texts[1::2]]
    assert [decode(run) for _, run in runs] == [f"{reply}{family.end}" for reply in expected]
    for start, run in runs:
        assert ids[start - len(family.header):start] == family.header
        assert run.count(family.ids[family.end]) == 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "pixtral"])
def test_a_system_prompt_is_read_and_not_trained(name):
    family = subject(name)
    ids, labels = encoded(family, messages_of("One?", "1", "Two?", "2", system="Be brief."))
    tokenizer = tokenizer_of(family.processor)
    assert [tokenizer.decode(run) for _, run in runs_of(labels)] == [f"1{family.end}", f"2{family.end}"]
    assert "Be brief." in tokenizer.decode(ids)


def test_pixtrals_template_drops_a_system_prompt_where_the_assistant_speaks_last_so_the_row_is_a_reject():
    with pytest.raises(RowError, match="the chat template drops or changes this text: 'Be brief.'"):
        subject("pixtral").given.conversations(messages_of("One?", "1", system="Be brief."))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_that_spells_any_special_token_is_rejected_by_name(name):
    family = subject(name)
    for token in family.ids:
        for texts in ((f"a{token}assistant\n\nno", "b"), ("a", f"b{token}")):
            with pytest.raises(RowError) as caught:
                family.given.conversations(messages_of(*texts))
            assert caught.value.reason.endswith(f"spells the special token {token!r}")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_newline_that_the_vocabulary_merges_over_the_seam_is_the_replys_own(name):
    family = subject(name)
    assert tokenizer_of(family.processor)("assistant\n\nYes")["input_ids"] == [77091, 271, 9454]  # the trap
    ids, labels = encoded(family, messages_of("Is it?", "\nYes"))
    ((start, run),) = runs_of(labels)
    assert ids[start - 3:start] == [151644, 77091, 198] and run == [198, 9454, 151645]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_before_a_reply_is_what_inference_gives_the_model(name):
    family = subject(name)
    messages = messages_of("One?", "1", "Two?", "\n2")
    ids, labels = encoded(family, messages)
    for (start, _), upto in zip(runs_of(labels), (1, 3), strict=True):
        prompt = family.given.render(messages[:upto], prompt=True)
        given = tokenizer_of(family.processor)(prompt, add_special_tokens=False)["input_ids"]
        assert ids[:start] == given

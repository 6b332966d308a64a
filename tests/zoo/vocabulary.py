"""Tokenizers with a tiny vocabulary: every byte, a few merges, and the special tokens a family gives them."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Merges across a space or a newline are there on purpose: as in real vocabularies, text tokenized in one piece
# and text tokenized in two (prompt and reply) can differ at the seam.
MERGES = [
    ("h", "e"), (" ", "t"), (" t", "he"), ("i", "n"), (" ", "a"), ("e", "r"), ("o", "n"), ("r", "e"), ("a", "t"),
    (" ", "s"), ("i", "s"), ("\n", "\n"), (".", "\n"), ("o", "u"), ("l", "l"), ("in", "g"), ("a", "n"), (" a", "n"),
    ("an", "d"), (" ", " "),
]  # fmt: skip

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _base(first: tuple, alphabet: list[str], space: str, newline: str) -> tuple[dict[str, int], list]:
    """(vocabulary, merges): the special tokens `first`, the alphabet, and what MERGES makes, spelled as the model does."""
    spell = str.maketrans({" ": space, "\n": newline})
    merges = [(left.translate(spell), right.translate(spell)) for left, right in MERGES]
    tokens = [*first, *alphabet, *(left + right for left, right in merges)]
    return {token: index for index, token in enumerate(tokens)}, merges


def byte_level(first: tuple = ()) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) in the manner of GPT-2, Llama-3 and Qwen: bytes written as printable characters."""
    byte_names = bytes_to_unicode()
    return _base(first, list(byte_names.values()), byte_names[ord(" ")], byte_names[ord("\n")])


def sentencepiece(first: tuple) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) in the manner of Llama-2 and Gemma: characters, ▁ for a space, bytes to fall back on."""
    characters = ["▁", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return _base(first, [*(f"<0x{byte:02X}>" for byte in range(256)), *characters], "▁", "\n")


def special(tokenizer, tokens: tuple):
    """The tokenizer, with `tokens` special: never split, and left out where special tokens are skipped."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return tokenizer


def gpt_like(first: tuple = (), last: tuple = (), **named) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a class of its own, splitting words as GPT-4 and Llama-3 do.

    `first` and `last` are the special tokens before and after the vocabulary; `named` says which are eos_token and so on.
    """
    vocabulary, merges = byte_level(first)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return special(PreTrainedTokenizerFast(tokenizer_object=backend, **named), (*first, *last))


def token_ids(tokenizer) -> dict[str, int | None]:
    """The ids a text configuration names: the beginning and end of a text, and padding."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

"""Tokenizers with a tiny vocabulary: every byte, a few merges, and the special tokens a family gives them."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Some merge across a space or a newline, on purpose: as in real vocabularies, text tokenized in one piece and
# text tokenized in two, prompt and reply, can then differ at the seam.
MERGES = [
    *[("h", "e"), (" ", "t"), (" t", "he"), ("i", "n"), (" ", "a"), ("e", "r"), ("o", "n"), ("r", "e")],
    *[("a", "t"), (" ", "s"), ("i", "s"), ("\n", "\n"), (".", "\n"), ("o", "u"), ("l", "l"), ("in", "g")],
    *[("a", "n"), (" a", "n"), ("an", "d"), (" ", " ")],
]
# How GPT-4, Llama-3 and Mistral's tekken cut a text into words before merging.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def spelled(first: tuple, alphabet: list[str], space: str, newline: str) -> tuple[dict[str, int], list]:
    """(vocabulary, merges): the special tokens `first`, then the alphabet, then what MERGES makes of it."""
    spelling = str.maketrans({" ": space, "\n": newline})
    merges = [(left.translate(spelling), right.translate(spelling)) for left, right in MERGES]
    tokens = [*first, *alphabet, *(left + right for left, right in merges)]
    return {token: index for index, token in enumerate(tokens)}, merges


def byte_level(first: tuple = ()) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) in the manner of GPT-2, Llama-3 and Qwen: bytes as printable characters."""
    character_of = bytes_to_unicode()
    return spelled(first, list(character_of.values()), character_of[ord(" ")], character_of[ord("\n")])


def sentencepiece(first: tuple) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) in the manner of Llama-2 and Gemma: ▁ for a space, and bytes to fall back on."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return spelled(first, [*byte_tokens, "▁", "\n", *characters], "▁", "\n")


def special(tokenizer, tokens: tuple):
    """The tokenizer, with `tokens` special: never split, and left out where special tokens are skipped."""
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def gpt_like(first: tuple = (), last: tuple = (), **named) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a class of its own.

    `first` and `last` are the special tokens before and after the vocabulary; `named` tells which of them is
    the eos_token, the pad_token and so on.
    """
    vocabulary, merges = byte_level(first)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    backend.decoder = decoders.ByteLevel()
    return special(PreTrainedTokenizerFast(tokenizer_object=backend, **named), (*first, *last))

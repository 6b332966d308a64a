"""spans: from the characters of a rendered text to the tokens that a processor makes of it.

A span is (start, end) in characters, the tokens' spans are an array [T, 2]. `replaced` is what a processor
wrote for media placeholders: [{"span": in the render, "new_span": in the text that it tokenized,
"replacement": that text}].
"""
import numpy as np
from tokenizers import Tokenizer, decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte-level vocabularies spell each byte as a printable character: the unprintable ones from U+0100 on.
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def moved(spans: list, replaced: list[dict]) -> list[tuple[int, int]]:
    """The spans after the processor wrote its replacements for the media placeholders before them."""
    def new(place: int) -> int:
        return place + sum((r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0])
                           for r in replaced if r["span"][1] <= place)
    return [(new(start), new(end)) for start, end in spans]


def after_replacing(text: str, replaced: list[dict]) -> str:
    """The text with the processor's replacements in place of the media placeholders."""
    pieces, last = [], 0
    for r in replaced:
        pieces += [text[last:r["span"][0]], r["replacement"]]
        last = r["span"][1]
    return "".join([*pieces, text[last:]])


def spans_of_tokens(offsets: list) -> np.ndarray:
    """Each token's characters, from the offsets that a tokenizer gives.

    Byte-level tokenizers leave a token's leading space out of its offsets; it is the token's all the same.
    """
    starts, ends = np.array(offsets, int).reshape(-1, 2).T
    before = np.maximum.accumulate(np.append(0, ends[:-1]))
    return np.stack([np.minimum(starts, before), ends], axis=1)


def straddled(tokens: np.ndarray, spans: list) -> list[int]:
    """Those borders of the spans that lie within a token, with characters of it on both sides."""
    starts, ends = tokens.T
    return [place for place in sorted({place for span in spans for place in span})
            if ((starts < place) & (place < ends)).any()]


def covered(tokens: np.ndarray, spans: list, without: list) -> np.ndarray:
    """For each token, whether it lies in one of the spans and in none of those `without`."""
    starts, ends = tokens.T

    def inside(ranges: list) -> np.ndarray:
        return np.any([(first <= starts) & (ends <= last) for first, last in ranges], axis=0)
    return (starts < ends) & inside(spans) & ~inside(without)


def bytes_of(tokenizer: Tokenizer) -> dict[int, bytes]:
    """What each token of a byte-level vocabulary spells; nothing where the vocabulary is another."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return {}
    spelt = {number: bytes(map(BYTE_OF.get, token)) for token, number in tokenizer.get_vocab(False).items()
             if BYTE_OF.keys() >= set(token)}
    added = tokenizer.get_added_tokens_decoder()
    return spelt | {number: token.content.encode() for number, token in added.items()}

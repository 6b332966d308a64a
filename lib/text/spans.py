"""spans: from the characters of a rendered text to the tokens that a processor makes of it.

A span is (start, end) in characters; the spans of tokens are an array [T, 2]. `replaced` says what a
processor wrote in place of media placeholders: [{"span": of the placeholder in the render, "new_span": of
what it wrote in the text that it tokenized, "replacement": what it wrote}].
"""
import re

import numpy as np
from tokenizers import Tokenizer, decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte-level vocabularies spell each byte as a printable character: the unprintable ones from U+0100 on.
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def moved(spans: list, replaced: list[dict]) -> list[tuple[int, int]]:
    """Spans of a render, moved into the text in which the processor has replaced media placeholders."""
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


def read_off(made: str, text: str, placeholder: str, special: str) -> list[dict]:
    """`replaced`, by comparing the text that a processor tokenized with the render; [] where they don't fit.

    placeholder, special: patterns of media placeholders and of special tokens; nothing but these tokens and
    white space is taken for what was written. Each has "read_off", since it may be other in another text.
    """
    shown = [found.span() for found in re.finditer(placeholder, text)]
    place, replaced = shown[0][0] if shown else 0, []
    for (start, end), following in zip(shown, [*(first for first, _ in shown[1:]), len(text)]):
        behind = re.escape(text[end:following]) + (r"\Z" if following == len(text) else "")
        found = re.compile(rf"((?:{special}|\s)+?){behind}").match(made, place)
        if not found:
            return []
        replaced.append({"span": (start, end), "new_span": found.span(1), "replacement": found[1],
                         "read_off": True})
        place = found.end()
    return replaced


def spans_of_tokens(offsets: list) -> np.ndarray:
    """The span of each token, [T, 2], from the offsets that a tokenizer gives.

    Byte-level tokenizers leave a token's leading space out of its offsets; here it belongs to the token.
    """
    starts, ends = np.array(offsets, int).reshape(-1, 2).T
    before = np.maximum.accumulate(np.append(0, ends[:-1]))
    return np.stack([np.minimum(starts, before), ends], axis=1)


def straddled(tokens: np.ndarray, spans: list) -> list[int]:
    """The borders of spans that fall inside a token, with characters of it on both sides."""
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
    """{id: the bytes that a token spells} of a byte-level vocabulary; {} for other vocabularies."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return {}
    spelt = {number: bytes(map(BYTE_OF.get, token)) for token, number in tokenizer.get_vocab(False).items()
             if BYTE_OF.keys() >= set(token)}
    added = tokenizer.get_added_tokens_decoder()
    return spelt | {number: token.content.encode() for number, token in added.items()}

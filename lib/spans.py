"""spans: from the characters of a rendered text to the tokens that a processor makes of it.

A span is (start, end) in characters. `replaced` is what a processor wrote for media placeholders:
[{"span": in the render, "new_span": in the text that it tokenized, "replacement": that text}].
"""


def moved(place: int, replaced: list[dict]) -> int:
    """A character's place after the processor wrote its replacements for the media placeholders before it."""
    return place + sum((r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0])
                       for r in replaced if r["span"][1] <= place)


def after_replacing(text: str, replaced: list[dict]) -> str:
    """The text with the processor's replacements in place of the media placeholders."""
    pieces, last = [], 0
    for r in replaced:
        pieces += [text[last:r["span"][0]], r["replacement"]]
        last = r["span"][1]
    return "".join([*pieces, text[last:]])


def spans_of_tokens(offsets: list) -> list[tuple[int, int]]:
    """Each token's characters, from the offsets that a tokenizer gives.

    Byte-level tokenizers leave a token's leading space out of its offsets; it is the token's all the same.
    """
    spans, last = [], 0
    for start, end in offsets:
        spans.append((min(start, last), end))
        last = max(last, end)
    return spans


def straddled(tokens: list[tuple[int, int]], places: list[int]) -> list[int]:
    """Those of the places that lie within a token, with characters of it on both sides."""
    return [place for place in places if any(start < place < end for start, end in tokens)]


def covered(tokens: list[tuple[int, int]], spans: list, without: list) -> list[bool]:
    """For each token, whether it lies in one of the spans and in none of those `without`."""
    def inside(start, end, ranges):
        return any(first <= start and end <= last for first, last in ranges)
    return [start < end and inside(start, end, spans) and not inside(start, end, without)
            for start, end in tokens]

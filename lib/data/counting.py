"""counting: how many tokens a conversation has, and how many are trained, without making its tensors.

What a processor writes for a picture follows from the picture's size. So the processor runs once for each
size, and not even that where transformers tells the number of tokens and told it right for pictures of
similar sizes. The counts are those of `Encoder.encode`; where they might differ, the result is None.

Fork me to: count other media (`TokenCounter.row`).
"""
import contextlib
import operator
from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from PIL import Image
from tokenizers import Encoding

from lib.run.errors import RowError
from lib.text.chat import Encoder
from lib.text.processor import adds_first_token, placeholders, tokenizer_of
from lib.text.spans import bytes_of

ENOUGH = 3                                # pictures of similar sizes told right, before the number is trusted
MOST_ROWS = 256                           # rows for whose pictures the processor's text is remembered
UNTOLD = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)     # raised where no number is told


class TokenCounter:
    """Counts the tokens that an encoder would make: (all tokens, trained tokens, media tokens)."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.processor, self.pictures = encoder, encoder.processor, Pictures(encoder.processor)
        self.never_trained = frozenset(encoder.never_trained)
        self.plain: dict[bool, bool] = {}                # {first token added: text left as it stands}
        self.tokenizer = tokenizer_of(self.processor).backend_tokenizer
        self.spelt = bytes_of(self.tokenizer)            # {id: its bytes}, if the vocabulary is byte-level

    def texts(self, given: list[tuple[str, list]]) -> list[tuple[int, int, int] | None]:
        """The counts of (text without media, trained spans) pairs; None where only `encode` can tell.

        All are tokenized in one call, without offsets where the tokens' bytes tell their places.
        """
        found: list[tuple | None] = [None] * len(given)
        if self.encoder.prefix:
            return found
        for first in (True, False):
            asked = [n for n, (text, _) in enumerate(given)
                     if adds_first_token(self.processor, text) == first]
            if asked and first not in self.plain:        # some processors may do more with a text
                self.plain[first] = self._is_plain(given[asked[0]][0], first)
            if not asked or not self.plain[first]:
                continue
            if self.spelt:
                for n, tokens in zip(asked, self._tokens([given[n][0] for n in asked], first, placed=False)):
                    found[n] = self._spelt_counts(*given[n], tokens.ids)
                asked = [n for n in asked if found[n] is None]
            for n, tokens in zip(asked, self._tokens([given[n][0] for n in asked], first)):
                found[n] = self._counts(*given[n], tokens, [])
        return found

    def _is_plain(self, text: str, first: bool) -> bool:
        """Whether the processor tokenizes a text as it stands.

        If the tokens don't spell the text byte for byte, self.spelt is emptied, so that offsets are used.
        """
        made, _ = self.encoder.process(text, [])
        (tokens,) = self._tokens([text], first)
        if self._spelt_counts(text, [], tokens.ids) is None:
            self.spelt = {}
        return made["input_ids"][0].tolist() == tokens.ids

    def row(self, text: str, spans: list, pictures: list[Image.Image]) -> tuple[int, int, int] | None:
        """The counts of a text with pictures and no other media; None where only `encode` can tell."""
        if self.encoder.prefix:
            return None
        sizes, made, said = tuple(picture.size for picture in pictures), None, []
        with contextlib.suppress(ValueError, RuntimeError):      # what the processor refuses, encode reports
            written = self.pictures.written(sizes)
            if written is None:
                batch, said = self.encoder.process(text, pictures)
                written = [each["replacement"] for each in said] or [self.pictures.token] * len(sizes)
                made = batch["input_ids"][0].tolist()
            (expanded,), (replaced,) = self.processor.get_text_with_replacements([text], written)
            (tokens,) = self._tokens([expanded], adds_first_token(self.processor, text))
            if made == tokens.ids and not any("read_off" in each for each in said):
                self.pictures.learn(sizes, written)
            if made in (None, tokens.ids):
                return self._counts(expanded, spans, tokens, replaced)
        return None

    def _tokens(self, texts: list[str], first: bool, placed: bool = True) -> list[Encoding]:
        """The ids and, if `placed`, the offsets of texts, by the processor's own tokenizer."""
        self.tokenizer.no_padding()                      # some processors leave it on
        self.tokenizer.no_truncation()
        encode = self.tokenizer.encode_batch if placed else self.tokenizer.encode_batch_fast
        return encode(texts, add_special_tokens=first)

    def _counts(self, text: str, spans: list, tokens: Encoding, replaced: list) -> tuple | None:
        ids, offsets = tokens.ids, tokens.offsets        # each access makes a new list
        if ids and not replaced and (counts := quick_counts(ids, offsets, spans, self.never_trained)):
            return counts
        with contextlib.suppress(RowError):
            ids, labels, _ = self.encoder.labelled(text, ids, offsets, spans, replaced)
            return self.encoder.counts(ids, labels)
        return None

    def _spelt_counts(self, text: str, spans: list, ids: list[int]) -> tuple | None:
        """The counts of a text whose tokens spell it byte for byte, so that they tell where each one ends.

        None where the tokens don't spell it.
        """
        in_bytes, pieces = text.encode(), list(map(self.spelt.get, ids))
        if None in pieces or b"".join(pieces) != in_bytes:
            return None
        if len(in_bytes) > len(text):
            spans = [[len(text[:border].encode()) for border in span] for span in spans]
        ends = list(accumulate(map(len, pieces)))
        return counts_in_order(ids, [0, *ends], ends, spans, self.never_trained)


def quick_counts(ids: list[int], offsets: list, spans: list, never_trained: frozenset) -> tuple | None:
    """(tokens, trained tokens, media tokens) as text/spans.py would find them, from the spans' borders alone.

    None where tokens don't stand in the order of their characters, where one lies across a border, and where
    one in a span has no characters.
    """
    starts, ends = zip(*offsets)
    if list(starts) != sorted(starts) or list(ends) != sorted(ends):
        return None
    return counts_in_order(ids, starts, ends, spans, never_trained)


def counts_in_order(ids, starts, ends, spans, never_trained) -> tuple | None:
    """(tokens, trained tokens, media tokens) of tokens in the order of their starts and ends.

    starts, ends and spans are in characters, or all in bytes. None where a token lies across a border of a
    span, and where one in a span is empty.
    """
    media = 0 if never_trained.isdisjoint(ids) else sum(i in never_trained for i in ids)
    trained, done = 0, 1                                         # no token predicts the first
    for span in spans:
        first, last = (bisect_right(ends, border) for border in span)    # the first that end behind
        for n, border in zip((first, last), span):
            if n < len(ends) and min(starts[n], ends[n - 1] if n else 0) < border:
                return None
        if any(map(operator.eq, starts[first:last], ends[first:last])):
            return None
        own = ids[max(first, done):last]
        trained += len(own) - (media and sum(i in never_trained for i in own))
        done = max(done, last)
    return len(ids), trained, media


class Pictures:
    """What a processor writes into a text for a row's pictures, by their sizes."""

    def __init__(self, processor):
        self.processor, self.token = processor, placeholders(processor).get("image")
        self.known: dict[tuple, list[str]] = {}          # by the sizes of a row's pictures
        self.tells = True                                # whether transformers tells how many tokens
        self.around: tuple[str, int, str] | None = None  # (text before them, how many more than told, behind)
        self.right: Counter = Counter()                  # {octaves of width and height: times it told right}

    def written(self, sizes: tuple) -> list[str] | None:
        """The text for each picture's (width, height); None where the processor has to be asked."""
        if self.tells and all(self.right[octaves(size)] >= ENOUGH for size in sizes):
            return [self._told(size) for size in sizes]
        return self.known.get(sizes)

    def learn(self, sizes: tuple, written: list[str]) -> None:
        """Remember what the processor wrote for a row's pictures of these sizes."""
        if len(self.known) >= MOST_ROWS:
            self.known.clear()
        self.known[sizes] = written
        self.tells = self.tells and self._is_right(sizes, written)
        self.right.update(map(octaves, sizes))

    def _told(self, size: tuple[int, int]) -> str:
        """The text for a picture, by the number that transformers tells; ValueError where it refuses."""
        before, more, behind = self.around
        return before + self.token * (self._number(size) + more) + behind

    def _number(self, size: tuple[int, int]) -> int:
        (number,) = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens
        return int(number)

    def _is_right(self, sizes: tuple, written: list[str]) -> bool:
        """Whether the number that transformers tells gives the text that the processor wrote."""
        with contextlib.suppress(*UNTOLD):
            if self.around is None:
                more = written[0].count(self.token)
                before, _, behind = written[0].partition(self.token * more)
                self.around = before, more - self._number(sizes[0]), behind
            return [self._told(size) for size in sizes] == written
        return False


def octaves(size: tuple[int, int]) -> tuple[int, int]:
    """The bit lengths of width and height, which pictures of similar sizes have in common."""
    width, height = size
    return width.bit_length(), height.bit_length()

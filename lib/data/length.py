"""length: a conversation made to fit into sequence_len, as excess_length_strategy says.

Fork me to: do something else with what is too long (`Length.fitted`, `cut`, `shrunk`).
"""
import json
from dataclasses import dataclass, replace

import numpy as np

from lib.data.counting import TokenCounter
from lib.media import media
from lib.media.budget import largest_budget
from lib.media.resolution import bounds_of, has_bounds
from lib.run.errors import RowError
from lib.run.terminal import counted
from lib.text.chat import Encoder
from lib.text.processor import placeholders, tokenizer_of
from lib.text.template import Conversation

TRIES = 8                          # of cutting a text: its last tokens may be others without what followed

COUNTS = ("input_tokens", "supervised_tokens", "media_tokens", "cut_tokens", "image_bounds")


class TooLong(RowError):
    """A row that is over sequence_len."""


@dataclass(frozen=True)
class Length:
    """What measures conversations, and shortens those that are too long."""
    config: object
    encoder: Encoder
    counter: TokenCounter

    def fitted(self, conversation: Conversation, opened: list, counts: tuple | None):
        """(the conversation, its counts), made to fit as excess_length_strategy says, or a RowError.

        Only text after the last medium is cut: media are whole, where the template put them. counts: those
        that are known without encoding it alone.
        """
        pictures = pictures_of(opened)
        if opened and len(pictures) == len(opened):
            counts = self.counter.row(conversation.text, conversation.spans, pictures)
        if counts and counts[0] <= self.config.sequence_len and counts[1]:
            return conversation, dict(zip(COUNTS, (*counts, 0, None)))
        whole, strategy = self.encode(conversation, opened), self.config.excess_length_strategy
        encoded, bounds, excess = whole, None, max(0, self.excess(whole))
        if excess and strategy == "truncate":
            conversation, encoded = self.cut(conversation, opened, whole)
        elif excess and strategy == "shrink_media" and pictures:
            bounds = self.shrunk(conversation, opened, whole)
            encoded = self.encode(conversation, opened, bounds)
        elif excess:
            raise self.too_long(self.in_words(whole), whole, opened)
        cut_tokens = 0 if bounds else excess
        return conversation, {**self.counts(encoded), "cut_tokens": cut_tokens, "image_bounds": bounds}

    def excess(self, encoded: dict) -> int:
        """By how many tokens tensors are over sequence_len; below zero: how many are free."""
        return encoded["input_ids"].shape[1] - self.config.sequence_len

    def in_words(self, encoded: dict) -> str:
        """How long a conversation is that is too long."""
        length = counted(encoded["input_ids"].shape[1], "token")
        return f"{length}, over sequence_len {self.config.sequence_len}"

    def cut(self, conversation: Conversation, opened: list, whole: dict) -> tuple[Conversation, dict]:
        """(the conversation without the end of its last text, its tensors); TooLong where no cut helps.

        whole: its tensors as it is.
        """
        encoded = whole
        for _ in range(TRIES):
            conversation = self.without_last(conversation, self.excess(encoded))
            if conversation is None:
                raise self.too_long(f"cut to sequence_len {self.config.sequence_len} behind its last medium, "
                                    "it teaches nothing", whole, opened)
            encoded = self.encode(conversation, opened)
            if self.excess(encoded) <= 0:
                return conversation, encoded
        raise self.too_long(self.in_words(whole), whole, opened)

    def shrunk(self, conversation: Conversation, opened: list, whole: dict) -> str:
        """The bounds of its pictures, as large as may be, with which it fits, as JSON; TooLong if none do."""
        processor, pixels = self.encoder.processor, self.encoder.pixels

        def fits(bounded, most: int) -> bool:
            rows = replace(self, encoder=replace(self.encoder, processor=bounded))
            return rows.excess(rows.encode(conversation, opened)) <= 0

        most = largest_budget(processor, pixels, fits)
        if most is None:
            raise self.too_long(f"{self.in_words(whole)}, even with the smallest pictures", whole, opened)
        return json.dumps(bounds_of(processor, pixels, most))

    def too_long(self, why: str, encoded: dict, opened: list) -> TooLong:
        """The error of a row with these tensors and media; its fix names a sequence_len that holds the row.

        That is a power of two, so that many rows share a fix. Where pictures are most of it and can be made
        smaller, the fix says how.
        """
        length, _, media_tokens = self.encoder.counts(*ids_and_labels(encoded))
        can_shrink = pictures_of(opened) and has_bounds(self.encoder.processor, self.encoder.pixels)
        instead = "shorten the row"
        if 2 * media_tokens > length and can_shrink and self.config.excess_length_strategy != "shrink_media":
            instead = "excess_length_strategy: shrink_media, or a max_image_tokens for all pictures"
        return TooLong(why, f"sequence_len: {1 << (length - 1).bit_length()}, or {instead}")

    def without_last(self, conversation: Conversation, tokens: int) -> Conversation | None:
        """The conversation without its last tokens; None where media or nothing to learn would be left."""
        text, tokenizer = conversation.text, tokenizer_of(self.encoder.processor)
        known = placeholders(self.encoder.processor).values()
        behind = max((text.rfind(token) + len(token) for token in known if token in text), default=0)
        rest = tokenizer(text[behind:], add_special_tokens=False, return_offsets_mapping=True)
        places = [start for start, _ in rest["offset_mapping"]]
        stop = behind + places[-tokens] if len(places) > tokens else behind
        spans = [(start, min(end, stop)) for start, end in conversation.spans if start < stop]
        start, end = conversation.reply
        if not spans or stop == behind:
            return None
        reply = (start, min(end, stop)) if start < stop else spans[-1]
        return replace(conversation, text=text[:stop], spans=spans, reply=reply)

    def encode(self, conversation: Conversation, opened: list, bounds: str | None = None) -> dict:
        """The tensors of a conversation; a RowError where the processor refuses its media."""
        try:
            return self.encoder.bounded(bounds).encode(conversation.text, conversation.spans, opened)
        except RowError:
            raise
        except (ValueError, RuntimeError) as error:
            sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures_of(opened))
            raise RowError(f"the processor refuses this row: {error} (pictures: {sizes or 'none'})",
                           "change the picture's size, or remove the row") from None

    def counts(self, encoded: dict) -> dict[str, int]:
        """The sample's token counts; a RowError if it teaches nothing."""
        counts = self.encoder.counts(*ids_and_labels(encoded))
        if not counts[1]:
            raise RowError("nothing to learn: no token is trained", "write what the assistant should answer")
        return dict(zip(COUNTS, counts))


def ids_and_labels(encoded: dict) -> tuple[np.ndarray, np.ndarray]:
    """The ids and labels [T] of a conversation's tensors."""
    return tuple(encoded[name][0].numpy() for name in ("input_ids", "labels"))


def pictures_of(opened: list) -> list:
    """Those of decoded media that are pictures."""
    return [medium for medium in opened if media.kind_of(medium) == "image"]

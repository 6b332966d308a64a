"""chat: a rendered conversation and its media as tensors, by the checkpoint's own processor.

`Encoder` is the one way from a sample to ids, labels and media tensors: 02 measures and shows with it, 05's
workers train with it, 06 asks with it. Labels follow characters: a token is trained if all of it lies in a
trained span of the text.
"""
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from lib import registry
from lib.collator import IGNORE_INDEX, goes_along
from lib.data.parts import NOUNS
from lib.media.locating import MediaError
from lib.media.media import Decoding, kind_of, open_medium
from lib.media.resolution import with_bounds
from lib.run.errors import RowError, StageError
from lib.run.ledger import read_json, write_json
from lib.text import processing
from lib.text.processor import (
    KINDS, adds_first_token, load_processor, placeholders, special_tokens, tokenizer_of)
from lib.text.spans import after_replacing, covered, moved, spans_of_tokens, straddled


@dataclass
class Encoder:
    """Makes a sample's tensors: `encoder(sample)`. It can be sent to workers: plain data and the processor.

    collate: how the family's media tensors are batched, a style of lib/collator.py.
    batch: which samples may share a batch, a rule of lib/batches/sampler.py.
    never_trained: ids that are never labels, wherever they stand (media placeholders and their wrappers).
    lacks: the kinds of media for which this checkpoint has no tower, although its processor takes them.
    longest_sound_seconds: longer sounds are refused, since the processor would cut them silently.
    one_kind: whether a row with both pictures and clips is refused.
    prefix: whether prompt and reply are given to the processor apart (lib/text/prefix.py).
    pixels: how the processor's pictures are bounded, a strategy of lib/media/resolution.py.
    decoding: how media are decoded.
    """
    processor: object
    collate: str
    batch: str
    never_trained: tuple[int, ...]
    lacks: tuple[str, ...] = ()
    longest_sound_seconds: float | None = None
    one_kind: bool = False
    prefix: bool = False
    pixels: str = ""
    decoding: Decoding = field(default_factory=Decoding)

    @classmethod
    def of(cls, processor, family: registry.Family, lacks: tuple[str, ...] = (), **decoding) -> "Encoder":
        """The encoder for a family's processor; decoding: values for the fields of media.Decoding."""
        tokenizer = tokenizer_of(processor)
        if processor is not tokenizer and not placeholders(processor):
            raise StageError(f"base_model: its {type(processor).__name__} doesn't say which token stands for "
                             "a picture", "choose another base_model: that token could end up in the labels")
        ids = {i for kind in KINDS for i in getattr(processor, f"{kind}_token_ids", [])}
        ids |= {*tokenizer.convert_tokens_to_ids([*family.wrappers, *placeholders(processor).values()])}
        ids -= {None, tokenizer.unk_token_id}
        extractors = [getattr(processor, part, None) for part in KINDS["audio"]]
        rate = {"sampling_rate": extractor.sampling_rate for extractor in extractors if extractor}
        return cls(processor, family.collate, family.batch, tuple(sorted(ids)), lacks,
                   family.longest_sound_seconds, family.one_kind, family.prefix, family.pixels,
                   Decoding(**rate, **decoding))

    def save(self, folder: Path) -> None:
        """Write processor and encoder facts, so that `load` gives the same encoder in any later process."""
        self.processor.save_pretrained(folder)
        facts = {fact.name: getattr(self, fact.name) for fact in fields(self) if fact.name != "processor"}
        facts["decoding"] = asdict(self.decoding)
        write_json(folder / "encoder.json", facts)

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False) -> "Encoder":
        """The encoder that 02 saved in its processor folder."""
        facts = {name: tuple(fact) if isinstance(fact, list) else fact
                 for name, fact in read_json(folder / "encoder.json").items()}
        facts["decoding"] = Decoding(**facts["decoding"])
        return cls(load_processor(folder, trust_remote_code=trust_remote_code), **facts)

    @property
    def pad_id(self) -> int:
        """The id that pads short rows; eos where there is no pad token, since padding is masked anyway."""
        tokenizer = tokenizer_of(self.processor)
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        """A sample's input_ids, attention_mask and labels [1, T], and the family's media tensors."""
        spans = [(span["start"], span["end"]) for span in sample["spans"]]
        return self.bounded(sample["image_bounds"]).encode(sample["text"], spans, self.open(sample["media"]))

    def bounded(self, bounds: str | None) -> "Encoder":
        """This encoder, but with the bounds (JSON) that 02 set for a sample whose pictures it has shrunk."""
        return replace(self, processor=with_bounds(self.processor, json.loads(bounds))) if bounds else self

    def open(self, records: list[dict]) -> list:
        """The decoded media of a sample's media records: RGB pictures, sounds as arrays, clips.

        Raises StageError for a file that is gone since 02 read it, or holds something else.
        """
        try:
            return [open_medium(record, self.decoding) for record in records]
        except MediaError as error:
            raise StageError(str(error), "where a path is relative, start in the folder in which 02_data ran;"
                                         " else run 02_data.py again with --force") from None

    def encode(self, text: str, spans: list[tuple[int, int]], media: list) -> dict[str, torch.Tensor]:
        """The tensors of a text; spans: its trained characters; media: in the order of their placeholders."""
        seam = spans[0][0] if self.prefix and spans else len(text)
        batch, replaced = self.process(text, media, seam)
        ((seam, _),) = moved([(seam, seam)], replaced)
        text, made = after_replacing(text, replaced), batch["input_ids"][0].tolist()
        if media:
            processing.refuse_unplaced(self.processor, text, seam, made)
        offsets = batch.pop("offset_mapping")[0].tolist()
        ids, labels, places = (torch.from_numpy(each)[None] for each in
                               self.labelled(text, made, offsets, spans, replaced))        # [1, T]
        if ids.tolist() != [made]:
            for key, value in batch.items():
                if goes_along(key, value, len(made), self.collate):
                    batch[key] = value[:, places[0]]
            batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return batch | {"labels": labels}

    def labelled(self, text: str, ids: list[int], offsets: list, spans: list, replaced: list[dict]
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, labels, places) [T] of a tokenized text; spans: in the render, before media were written in.

        The ids differ from the given ones where the tokenizer merged prompt and reply across their seam;
        places: for each id, the index of the given one that stands at the same characters.
        """
        # The processor writes many tokens for each placeholder: spans move into the text that it tokenized.
        spans, tokens = moved(spans, replaced), spans_of_tokens(offsets)
        places = np.arange(len(ids))
        if seams := straddled(tokens, spans):
            merged, starts = ids, tokens[:, 0]
            ids, tokens = self._tokenized_apart(text, merged, seams)
            places = np.searchsorted(starts, tokens[:, 0], side="right") - 1
            same = len(os.path.commonprefix([merged, ids]))
            places[:same] = np.arange(same)        # tokens before the text start with it
        ids = np.array(ids)
        trained = covered(tokens, spans, without=[r["new_span"] for r in replaced])
        return ids, np.where(trained & ~np.isin(ids, self.never_trained), ids, IGNORE_INDEX), places

    def counts(self, ids: np.ndarray, labels: np.ndarray) -> tuple[int, int, int]:
        """(tokens, trained tokens, media tokens) of ids and labels [T].

        The first token never counts as trained, since no token predicts it.
        """
        return (len(ids), int((labels[1:] != IGNORE_INDEX).sum()),
                int(np.isin(ids, self.never_trained).sum()))

    def prompt(self, sample: dict) -> tuple[str, list, str]:
        """(the text up to the reply that is asked for, the media in it, the reply without special tokens)."""
        start, end = sample["reply"]["start"], sample["reply"]["end"]
        text = sample["text"][:start]
        shown = sum(text.count(token) for token in placeholders(self.processor).values())
        reply = special_tokens(self.processor).sub("", sample["text"][start:end]).strip()
        return text, self.open(sample["media"][:shown]), reply

    def process(self, text: str, media: list, seam: int | None = None) -> tuple[dict, list[dict]]:
        """(the processor's tensors, what it wrote into the text), as lib/text/processing.py makes them.

        seam: where the reply begins, for a processor that takes it apart; None: the text has none.
        """
        given = {kind: [medium for medium in media if kind_of(medium) == kind] for kind in KINDS}
        self._refuse_media(given)
        return processing.process(self.processor, text, given, self.prefix, seam)

    def _refuse_media(self, given: dict[str, list]) -> None:
        """Raise RowError for media that the model would not see whole, or not at all."""
        for kind in self.lacks:
            if given[kind]:
                raise RowError(f"the row has a {NOUNS[kind]}, and base_model has no tower for one",
                               f"name a base_model that takes {NOUNS[kind]}s, or remove the row")
        if self.prefix and not given["image"]:
            raise RowError("the row has no picture, and base_model's processor takes no text alone",
                           "give it a picture, or remove the row")
        longest = max(map(len, given["audio"]), default=0) / self.decoding.sampling_rate
        if self.longest_sound_seconds and longest > self.longest_sound_seconds:
            raise RowError(f"{longest:.1f} seconds of sound; base_model takes {self.longest_sound_seconds:g}",
                           "cut the sound into shorter ones, each with its own answer")
        if self.one_kind and given["image"] and given["video"]:
            raise RowError("a picture and a clip in one row, which base_model can't tell apart",
                           "give the picture as a clip of one frame, or make two rows of it")

    def _tokenized_apart(self, text: str, merged: list, seams: list) -> tuple[list[int], np.ndarray]:
        """(ids, their characters' spans) of prompt and reply tokenized apart, as at inference.

        Raises RowError where these ids spell another text than the merged ones.
        """
        tokenizer, ids, offsets = tokenizer_of(self.processor), [], []
        for start, end in zip([0, *seams], [*seams, len(text)]):
            # Llama's tokenizers put a space before a text, but not before what follows a special token.
            lead = tokenizer.eos_token or "" if start else ""
            first = start == 0 and adds_first_token(self.processor, text)
            piece = tokenizer(lead + text[start:end], add_special_tokens=first, return_offsets_mapping=True)
            ids += piece["input_ids"][bool(lead):]
            shift = start - len(lead)
            offsets += [(a + shift, b + shift) for a, b in piece["offset_mapping"][bool(lead):]]
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if tokenizer.decode(ids, **plain) != tokenizer.decode(merged, **plain):
            raise RowError("the tokenizer can't tell the end of the prompt from the start of the reply",
                           "start the reply with another character (no space or newline)")
        return ids, spans_of_tokens(offsets)

"""chat: a rendered conversation and its media as tensors, by the checkpoint's own processor.

`Encoder` is the one way from a sample to ids, labels and media tensors: 02 measures and shows with it, 05's
workers train with it, 06 asks with it. Labels follow characters: a token is trained if all of it lies in a
trained span of the text.
"""
import functools
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from lib import registry
from lib.media import Sampling, kind_of, open_medium
from lib.messages import NOUNS, RowError
from lib.processor import (
    KINDS, adds_first_token, load_processor, media_arguments, placeholders, special_tokens, tokenizer_of)
from lib.resolution import with_bounds
from lib.spans import after_replacing, covered, moved, spans_of_tokens, straddled
from lib.stage import StageError

IGNORE_INDEX = -100                       # what torch's cross-entropy skips


@dataclass
class Encoder:
    """Makes a sample's tensors: `encoder(sample)`. Only plain data and the processor, so workers can have it.

    collate: how the family's media tensors make a batch, for lib/collator.py.
    batch: which samples may share a batch, for lib/sampler.py.
    never_trained: ids that are out of the labels wherever they stand (media placeholders and their wrappers).
    lacks: the kinds of media for which this checkpoint has no tower, although its processor takes them.
    longest_sound_seconds: what the processor would cut off silently, so that it is refused.
    one_kind: whether pictures and clips can't stand in one row.
    pixels: how the processor's pictures are bounded, for lib/resolution.py.
    sampling: how sounds and clips are decoded.
    """
    processor: object
    collate: str
    batch: str
    never_trained: tuple[int, ...]
    lacks: tuple[str, ...] = ()
    longest_sound_seconds: float | None = None
    one_kind: bool = False
    pixels: str = ""
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, processor, family: registry.Family, lacks: tuple[str, ...] = (), **sampling) -> "Encoder":
        """The encoder of a family's processor; `sampling` are those fields of media.Sampling for clips."""
        tokenizer = tokenizer_of(processor)
        if processor is not tokenizer and not placeholders(processor):
            raise StageError(f"base_model: its {type(processor).__name__} doesn't say which token stands for "
                             "a picture", "choose another base_model: that token could end up in the labels")
        ids = {i for kind in KINDS for i in getattr(processor, f"{kind}_token_ids", [])}
        tokens = (*family.wrappers, *placeholders(processor).values())
        ids |= {tokenizer.convert_tokens_to_ids(token) for token in tokens}
        ids -= {None, tokenizer.unk_token_id}
        extractors = [getattr(processor, part, None) for part in KINDS["audio"]]
        rate = {"sampling_rate": extractor.sampling_rate for extractor in extractors if extractor}
        return cls(processor, family.collate, family.batch, tuple(sorted(ids)), lacks,
                   family.longest_sound_seconds, family.one_kind, family.pixels,
                   Sampling(**rate, **sampling))

    def save(self, folder: Path) -> None:
        """Write processor and encoder facts, so that `load` gives the same encoder in any later process."""
        self.processor.save_pretrained(folder)
        facts = {fact.name: getattr(self, fact.name) for fact in fields(self) if fact.name != "processor"}
        facts["sampling"] = asdict(self.sampling)
        (folder / "encoder.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False) -> "Encoder":
        """The encoder that 02 saved in its processor folder."""
        facts = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        facts = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()}
        facts["sampling"] = Sampling(**facts["sampling"])
        return cls(load_processor(folder, trust_remote_code=trust_remote_code), **facts)

    @property
    def pad_id(self) -> int:
        """The id that fills short rows. It is masked everywhere, so eos serves where there is none."""
        tokenizer = tokenizer_of(self.processor)
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels [1, T] and the family's media tensors, of one sample."""
        spans = [(span["start"], span["end"]) for span in sample["spans"]]
        return self.bounded(sample["image_bounds"]).encode(sample["text"], spans, self.open(sample["media"]))

    def bounded(self, bounds: str | None) -> "Encoder":
        """This encoder, or that of a sample whose pictures 02 has shrunk: what it set for them, as JSON."""
        return replace(self, processor=with_bounds(self.processor, json.loads(bounds))) if bounds else self

    def open(self, records: list[dict]) -> list:
        """The decoded media of a sample's records: pictures, samples of sounds, clips."""
        return [open_medium(record, self.sampling) for record in records]

    def encode(self, text: str, spans: list[tuple[int, int]], media: list) -> dict[str, torch.Tensor]:
        """The tensors of a text with trained character spans and its media, in the order of their places."""
        batch = self._process(text, media)
        tokens = spans_of_tokens(batch.pop("offset_mapping")[0].tolist())
        # The processor writes many tokens for each placeholder: spans move into the text that it tokenized.
        replaced = batch.pop("text_replacement_offsets", None)
        replaced = replaced[0] if isinstance(replaced, list) and replaced else []   # or a tensor of none
        if media:
            self._refuse_unplaced(after_replacing(text, replaced), batch["input_ids"][0].tolist())
        spans = [(moved(start, replaced), moved(end, replaced)) for start, end in spans]
        seams = straddled(tokens, sorted({place for span in spans for place in span}))
        if seams:
            tokens = self._tokenize_apart(batch, after_replacing(text, replaced), seams)
        ids = batch["input_ids"][0].tolist()
        trained = covered(tokens, spans, without=[tuple(r["new_span"]) for r in replaced])
        batch["labels"] = torch.tensor([[                                        # [1, T]
            i if keep and i not in self.never_trained else IGNORE_INDEX for i, keep in zip(ids, trained)]])
        return batch

    def counted(self, given: list[tuple[str, list]]) -> list[tuple[int, int, int] | None]:
        """(tokens, trained ones, tokens of media) of each text without media and its trained characters.

        All are tokenized in one call; None stands where only `encode` can tell, which these are equal to.
        """
        found: list[tuple | None] = [None] * len(given)
        for first in (True, False):
            places = [n for n, (text, _) in enumerate(given)
                      if adds_first_token(self.processor, text) == first]
            texts = [given[n][0] for n in places]
            if not texts:
                continue
            batch = tokenizer_of(self.processor)(texts, add_special_tokens=first, return_offsets_mapping=True)
            if first not in self._plain:                         # some processors may do more with a text
                made = self._process(texts[0], [])["input_ids"][0].tolist()
                self._plain[first] = made == batch["input_ids"][0]
            if not self._plain[first]:
                continue
            for n, ids, offsets in zip(places, batch["input_ids"], batch["offset_mapping"]):
                found[n] = counts_of(np.array(ids), np.array(offsets), given[n][1], self.never_trained)
        return found

    def prompt(self, sample: dict) -> tuple[str, list, str]:
        """(text up to the reply that is asked for, the media before it, its text without special tokens)."""
        start, end = sample["reply"]["start"], sample["reply"]["end"]
        text = sample["text"][:start]
        shown = sum(text.count(token) for token in placeholders(self.processor).values())
        reply = self._special.sub("", sample["text"][start:end]).strip()
        return text, self.open(sample["media"][:shown]), reply

    @functools.cached_property
    def _plain(self) -> dict[bool, bool]:
        return {}                                                # whether texts are tokenized as they stand

    @functools.cached_property
    def _special(self) -> re.Pattern:
        return special_tokens(self.processor)

    def _process(self, text: str, media: list) -> dict:
        """The processor's tensors. Floats are float32: some processors round to bfloat16 for any model."""
        given = {kind: [medium for medium in media if kind_of(medium) == kind] for kind in KINDS}
        self._refuse(given)
        options = {"return_tensors": "pt", "return_offsets_mapping": True,
                   "add_special_tokens": adds_first_token(self.processor, text)}
        if self.processor is tokenizer_of(self.processor):
            batch = dict(self.processor([text], **options))
        else:
            batch = dict(self.processor(text=[text], padding_side="right", **media_arguments(given),
                                        return_text_replacement_offsets=True, **options))
        return {key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for key, value in batch.items()}

    def _refuse_unplaced(self, text: str, ids: list[int]) -> None:
        """StageError where the processor tokenized another text than it says: labels would shift."""
        first = adds_first_token(self.processor, text)
        if tokenizer_of(self.processor)(text, add_special_tokens=first)["input_ids"] != ids:
            name = type(self.processor).__name__
            raise StageError(f"base_model: its {name} writes more into the text than it says, or elsewhere",
                             "choose another base_model: labels would be misplaced")

    def _refuse(self, given: dict[str, list]) -> None:
        """RowError for media that the model would not see whole, or not at all."""
        for kind in self.lacks:
            if given[kind]:
                raise RowError(f"the row has a {NOUNS[kind]}, and base_model has no tower for one",
                               f"name a base_model that takes {NOUNS[kind]}s, or remove the row")
        longest = max(map(len, given["audio"]), default=0) / self.sampling.sampling_rate
        if self.longest_sound_seconds and longest > self.longest_sound_seconds:
            raise RowError(f"{longest:.1f} seconds of sound; base_model takes {self.longest_sound_seconds:g}",
                           "cut the sound into shorter ones, each with its own answer")
        if self.one_kind and given["image"] and given["video"]:
            raise RowError("a picture and a clip in one row, which base_model can't tell apart",
                           "give the picture as a clip of one frame, or make two rows of it")

    def _tokenize_apart(self, batch: dict, text: str, seams: list[int]) -> list[tuple[int, int]]:
        """Tokenize prompt and reply apart, as inference does, where the tokenizer merged across their seam.

        Replaces the [1, T] tensors of `batch`, returns the tokens' characters. Token types follow their ids.
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
        merged = batch["input_ids"][0].tolist()
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if tokenizer.decode(ids, **plain) != tokenizer.decode(merged, **plain):
            raise RowError("the tokenizer can't tell the end of the prompt from the start of the reply",
                           "start the reply with another character (no space or newline)")
        for key in [key for key in batch if key.endswith("token_type_ids")]:
            kinds = dict(zip(merged, batch[key][0].tolist()))
            batch[key] = torch.tensor([[kinds.get(i, 0) for i in ids]])
        batch["input_ids"] = torch.tensor([ids])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return spans_of_tokens(offsets)


def counts_of(ids: np.ndarray, offsets: np.ndarray, spans: list, never_trained: tuple) -> tuple | None:
    """(tokens, trained ones, tokens of media) of a text's ids [T] and offsets [T, 2], by its trained spans.

    It is what lib/spans.py says token by token; None where a token lies across the border of a span.
    """
    ends = offsets[:, 1]
    last = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.minimum(offsets[:, 0], last)
    trained = np.zeros(len(ids), bool)
    for first, end in spans:
        for place in (first, end):
            if ((starts < place) & (place < ends)).any():
                return None
        trained |= (first <= starts) & (ends <= end)
    media = np.isin(ids, never_trained)
    trained &= (starts < ends) & ~media
    return len(ids), int(trained[1:].sum()), int(media.sum())    # no token predicts the first

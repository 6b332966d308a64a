"""chat: a rendered conversation and its pictures as tensors, by the checkpoint's own processor.

`Encoder` is the one way from a sample to ids, labels and media tensors: 02 measures and shows with it, 05's
workers train with it, 06 asks with it. Labels follow characters: a token is trained if all of it lies in a
trained span of the text.
"""
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import registry
from lib.media import open_image
from lib.messages import RowError
from lib.processor import KINDS, adds_first_token, load_processor, placeholders, special_tokens, tokenizer_of
from lib.spans import after_replacing, covered, moved, spans_of_tokens, straddled

IGNORE_INDEX = -100                       # what torch's cross-entropy skips


@dataclass
class Encoder:
    """Makes a sample's tensors: `encoder(sample)`. Only plain data and the processor, so workers can have it.

    collate: how the family's media tensors make a batch, for lib/collator.py.
    batch: which samples may share a batch, for lib/sampler.py.
    never_trained: ids that are out of the labels wherever they stand (media placeholders and their wrappers).
    """
    processor: object
    collate: str
    batch: str
    never_trained: tuple[int, ...]

    @classmethod
    def of(cls, processor, family: registry.Family) -> "Encoder":
        """The encoder of a family's processor."""
        tokenizer = tokenizer_of(processor)
        ids = {i for kind in KINDS for i in getattr(processor, f"{kind}_token_ids", [])}
        tokens = (*family.wrappers, *placeholders(processor).values())
        ids |= {tokenizer.convert_tokens_to_ids(token) for token in tokens}
        ids -= {None, tokenizer.unk_token_id}
        return cls(processor, family.collate, family.batch, tuple(sorted(ids)))

    def save(self, folder: Path) -> None:
        """Write processor and encoder facts, so that `load` gives the same encoder in any later process."""
        self.processor.save_pretrained(folder)
        facts = {"collate": self.collate, "batch": self.batch, "never_trained": list(self.never_trained)}
        (folder / "encoder.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False) -> "Encoder":
        """The encoder that 02 saved in its processor folder."""
        facts = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
        return cls(processor, facts["collate"], facts["batch"], tuple(facts["never_trained"]))

    @property
    def pad_id(self) -> int:
        """The id that fills short rows. It is masked everywhere, so eos serves where there is none."""
        tokenizer = tokenizer_of(self.processor)
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels [1, T] and the family's media tensors, of one sample."""
        spans = [(span["start"], span["end"]) for span in sample["spans"]]
        return self.encode(sample["text"], spans, [open_image(medium) for medium in sample["media"]])

    def encode(self, text: str, spans: list[tuple[int, int]], images: list) -> dict[str, torch.Tensor]:
        """The tensors of a text with trained character spans and its pictures."""
        batch = self._process(text, images)
        tokens = spans_of_tokens(batch.pop("offset_mapping")[0].tolist())
        # The processor writes many tokens for each placeholder: spans move into the text that it tokenized.
        replaced = batch.pop("text_replacement_offsets", [[]])[0]
        replaced = [] if isinstance(replaced, torch.Tensor) else replaced    # some make a tensor of none
        spans = [(moved(start, replaced), moved(end, replaced)) for start, end in spans]
        seams = straddled(tokens, sorted({place for span in spans for place in span}))
        if seams:
            tokens = self._tokenize_apart(batch, after_replacing(text, replaced), seams)
        ids = batch["input_ids"][0].tolist()
        trained = covered(tokens, spans, without=[tuple(r["new_span"]) for r in replaced])
        batch["labels"] = torch.tensor([[                                        # [1, T]
            i if keep and i not in self.never_trained else IGNORE_INDEX for i, keep in zip(ids, trained)]])
        return batch

    def prompt(self, sample: dict) -> tuple[str, list, str]:
        """(text up to the last reply, the pictures before it, that reply's text without its end of turn)."""
        start, end = sample["spans"][-1]["start"], sample["spans"][-1]["end"]
        text = sample["text"][:start]
        shown = sum(text.count(token) for token in placeholders(self.processor).values())
        reply = self._special.sub("", sample["text"][start:end]).strip()
        return text, [open_image(medium) for medium in sample["media"][:shown]], reply

    @functools.cached_property
    def _special(self) -> re.Pattern:
        return special_tokens(self.processor)

    def _process(self, text: str, images: list) -> dict:
        """The processor's tensors. Floats are float32: some processors round to bfloat16 for any model."""
        options = {"return_tensors": "pt", "return_offsets_mapping": True,
                   "add_special_tokens": adds_first_token(self.processor, text)}
        if self.processor is tokenizer_of(self.processor):
            batch = dict(self.processor([text], **options))
        else:
            batch = dict(self.processor(text=[text], images=images or None, padding_side="right",
                                        return_text_replacement_offsets=True, **options))
        return {key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for key, value in batch.items()}

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

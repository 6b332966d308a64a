"""tekken: Mistral's processor, which only reads conversations, made to take rendered texts with offsets.

Mistral's own library turns messages straight into ids: there is no text whose characters labels could follow.
Here its tekken.json becomes a tokenizer with offsets, and the same library's encoder spells out a sound's
placeholder, so that the ids are those that the library itself would give.
"""
import json
from pathlib import Path

import numpy as np


class TekkenProcessor:
    """A processor as the kit uses one (call, render, save) around the published one, which is saved."""

    def __init__(self, published, chat_template: str | None):
        from transformers.integrations.mistral import convert_tekken_tokenizer
        self.published, self.feature_extractor = published, published.feature_extractor
        file = str(published.tokenizer._tokenizer_path)
        self.tokenizer = convert_tekken_tokenizer(file, chat_template=" ")      # without one it makes one up
        self.audio_token, self.chat_template = published.audio_token, chat_template
        self.tokenizer.chat_template = chat_template
        encoder = published.tokenizer.tokenizer.instruct_tokenizer.audio_encoder
        self.audio_token_ids = sorted({encoder.audio_token, encoder.begin_audio_token})

    def apply_chat_template(self, messages: list[dict], **options) -> str:
        """The text of a conversation, by the kit's template, since the published processor has none."""
        return self.tokenizer.apply_chat_template(messages, **{"chat_template": self.chat_template} | options)

    def save_pretrained(self, folder: Path) -> None:
        """Save the published processor's files, the template, and which class reads tekken.json.

        A checkpoint's config.json says that class, but an adapter's folder has none: AutoProcessor would then
        take another.
        """
        self.published.chat_template = self.chat_template
        self.published.save_pretrained(folder)
        named = json.dumps({"tokenizer_class": type(self.published.tokenizer).__name__})
        Path(folder, "tokenizer_config.json").write_text(named + "\n", encoding="utf-8")

    def __call__(self, text: list[str], audio: list | None = None, **options) -> dict:
        """The tensors of one text and its sounds, as other processors give them."""
        options = {key: value for key, value in options.items() if key != "return_text_replacement_offsets"}
        spelled, arrays = [], []
        for samples in audio or []:
            ids, padded = self._encode(samples)
            spelled.append("".join(self.tokenizer.convert_ids_to_tokens(ids)))
            arrays.append(padded)
        expanded, replaced = self.published.get_text_with_replacements([*text], audio_replacements=spelled)
        batch = dict(self.tokenizer(expanded, **options), text_replacement_offsets=replaced)
        if arrays:
            features = self.published._retrieve_input_features(arrays, **self.published.audio_kwargs)
            batch["input_features"] = features             # [chunks of 30 s, mel, frames]
        return batch

    def _encode(self, samples: np.ndarray) -> tuple[list[int], np.ndarray]:
        """(ids that stand for a sound, its samples padded to whole chunks), by Mistral's own encoder."""
        from mistral_common.tokens.tokenizers.audio import Audio
        sound = Audio(samples, self.feature_extractor.sampling_rate, "wav")
        found = self.published.tokenizer.tokenizer.instruct_tokenizer.audio_encoder.encode_audio(sound)
        return found.tokens, found.audio.audio_array

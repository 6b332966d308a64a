"""The Mistral line: Pixtral, Mistral-Small-3.1 and 4, Magistral, Voxtral."""

import base64
import json

from transformers import (
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    Mistral4Config,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    VoxtralConfig,
    WhisperFeatureExtractor,
)

from tests.zoo.checkpoint import Parts, decoder, require, tower
from tests.zoo.vocabulary import MERGES, WORDS, gpt_like

# In the order of tekken.json, where a token's place is its id: processors count on [IMG] 10 and [AUDIO] 24.
SPECIAL = (
    *"<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]".split(),
    *"[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]".split(),
    *"[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]".split(),
    *"<SPECIAL_20> <SPECIAL_21> <SPECIAL_22> <SPECIAL_23> [AUDIO] [BEGIN_AUDIO] <SPECIAL_26>".split(),
    *"<SPECIAL_27> <SPECIAL_28> <SPECIAL_29> <SPECIAL_30> <SPECIAL_31> [ARGS] [CALL_ID]".split(),
    *"[TRANSCRIBE] [THINK] [/THINK]".split(),
)
STOP = ("</s>",)
PATCH = {"height": 8, "width": 8}


def mistral_tokenizer():
    """A tokenizer with tekken's special tokens, in the form that transformers saves."""
    named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return gpt_like(first=SPECIAL, add_bos_token=True, **named)


def tekken_json(version: str, **media: dict) -> str:
    """The text of a tekken.json with those special tokens, bytes and merges, and its parts for `media`."""
    pieces = [bytes([byte]) for byte in range(256)] + [(left + right).encode() for left, right in MERGES]
    encoded = [(base64.b64encode(piece).decode(), piece.decode(errors="replace")) for piece in pieces]
    vocab = [dict(rank=rank, token_bytes=code, token_str=text) for rank, (code, text) in enumerate(encoded)]
    tokens = [dict(rank=rank, token_str=token, is_control=True) for rank, token in enumerate(SPECIAL)]
    config = {"pattern": WORDS, "version": version, "num_vocab_tokens": len(vocab)}
    config |= {"default_vocab_size": len(vocab) + len(SPECIAL), "default_num_special_tokens": len(SPECIAL)}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": tokens, **media})


def dense(tokenizer) -> MistralConfig:
    """The dense decoder of Pixtral, Mistral-Small-3.1 and Magistral."""
    return MistralConfig(**decoder(tokenizer, head_dim=16, sliding_window=None))


def pixtral() -> Parts:
    """Pixtral 12B: LLaVA around a tower that reads rows of patches, with a break after each."""
    tokenizer = mistral_tokenizer()
    config = LlavaConfig(
        text_config=dense(tokenizer),
        vision_config=PixtralVisionConfig(**tower(image_size=64, patch_size=8)),
        image_token_index=SPECIAL.index("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    image_processor = PixtralImageProcessor(size={"longest_edge": 32}, patch_size=PATCH)
    return Parts(config, PixtralProcessor(image_processor, tokenizer, patch_size=8), STOP, "pixtral")


def mistral3(text_config=None, template: str | None = "mistral_v7", tekken: str | None = None) -> Parts:
    """Mistral-Small-3.1: Pixtral's tower, with 2x2 patches merged into a token."""
    tokenizer = mistral_tokenizer()
    config = Mistral3Config(
        text_config=text_config or dense(tokenizer),
        vision_config=PixtralVisionConfig(**tower(image_size=64, patch_size=8)),
        image_token_index=SPECIAL.index("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    # At most 4x4 tokens. A picture of one token, not above 16x16 pixels, would break the model's own split.
    image_processor = PixtralImageProcessor(size={"longest_edge": 64}, patch_size=PATCH)
    processor = PixtralProcessor(image_processor, tokenizer, patch_size=8, spatial_merge_size=2)
    return Parts(config, processor, STOP, template, tekken=tekken)


def mistral4() -> Parts:
    """Mistral-Small-4: latent attention and experts; there is no q_proj, k_proj or v_proj."""
    ranks = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return mistral3(Mistral4Config(**decoder(mistral_tokenizer(), num_key_value_heads=4, **ranks, **experts)))


def magistral() -> Parts:
    """Magistral-Small-2509: the folder holds tekken.json, but no tokenizer.json and no chat template."""
    image = {"image_patch_size": 8, "max_image_size": 64, "spatial_merge_size": 2}
    return mistral3(template=None, tekken=tekken_json("v11", image=image))


def voxtral() -> Parts:
    """Voxtral: 375 tokens for each started 30 seconds of sound; tekken.json only, read by mistral-common."""
    for package in ("mistral_common", "soundfile"):
        require(package, needed_by="voxtral's processor", pip="'mistral-common[audio]'")
    tokenizer = mistral_tokenizer()
    config = VoxtralConfig(
        text_config=LlamaConfig(**decoder(tokenizer, head_dim=16)),
        audio_config=tower(intermediate_size=128),  # the projector reads four frames of 32 features as one
        audio_token_id=SPECIAL.index("[AUDIO]"),
    )
    extractor = WhisperFeatureExtractor(feature_size=128)
    extractor.processor_class = "VoxtralProcessor"  # as in the published preprocessor_config.json
    audio = {"sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0}
    audio["audio_encoding_config"] = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    return Parts(config, extractor, STOP, tokenizer=tokenizer, tekken=tekken_json("v7", audio=audio))

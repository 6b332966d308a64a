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

from tests.zoo.checkpoint import DECODER, TOWER, Parts
from tests.zoo.vocabulary import MERGES, WORDS, gpt_like, token_ids

# In the order of tekken.json: a token's place is its id, and processors rely on [IMG] being 10 and [AUDIO] 24.
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
SPECIAL += ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]")
SPECIAL += ("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
SPECIAL += tuple(f"<SPECIAL_{index}>" for index in range(20, 24)) + ("[AUDIO]", "[BEGIN_AUDIO]")
SPECIAL += tuple(f"<SPECIAL_{index}>" for index in range(26, 32)) + ("[ARGS]", "[CALL_ID]", "[TRANSCRIBE]")
SPECIAL += ("[THINK]", "[/THINK]")
VISION = PixtralVisionConfig(image_size=64, patch_size=8, **TOWER)


def tokenizer_of_mistral():
    """A tokenizer with tekken's special tokens, in the form that transformers saves."""
    named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", add_bos_token=True)
    return gpt_like(first=SPECIAL, **named)


def tekken(version: str, **media) -> str:
    """The text of a tekken.json with the same special tokens, bytes and merges; `media` are its image and audio parts."""
    pieces = [bytes([byte]) for byte in range(256)] + [(left + right).encode() for left, right in MERGES]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for rank, piece in enumerate(pieces)
    ]
    config = {"pattern": WORDS, "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + len(SPECIAL)}
    config |= {"default_num_special_tokens": len(SPECIAL), "version": version}
    tokens = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIAL)]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": tokens, **media})


def pixtral() -> Parts:
    """Pixtral 12B: Llava around Pixtral's tower, which reads rows of patches with a break after each."""
    tokenizer = tokenizer_of_mistral()
    config = LlavaConfig(
        text_config=MistralConfig(
            vocab_size=len(tokenizer), sliding_window=None, head_dim=16, **DECODER, **token_ids(tokenizer)
        ),
        vision_config=VISION,
        image_token_index=SPECIAL.index("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    image_processor = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return Parts(config, PixtralProcessor(image_processor, tokenizer, patch_size=8), ("</s>",), "pixtral")


def mistral3_with(decoder, tokenizer, **more) -> Parts:
    """Mistral-3: Pixtral's tower with 2x2 patches merged, around a given decoder."""
    config = Mistral3Config(
        text_config=decoder,
        vision_config=VISION,
        image_token_index=SPECIAL.index("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    # At most 4x4 tokens of 16x16 pixels, and never one: a picture of a single token breaks the model's split.
    image_processor = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(image_processor, tokenizer, patch_size=8, spatial_merge_size=2)
    return Parts(config, processor, stop=("</s>",), **more)


def mistral3_decoder(tokenizer) -> MistralConfig:
    """The dense decoder of Mistral-Small-3.1 and Magistral."""
    sizes = dict(vocab_size=len(tokenizer), sliding_window=None, head_dim=16)
    return MistralConfig(**sizes, **DECODER, **token_ids(tokenizer))


def mistral3() -> Parts:
    """Mistral-Small-3.1."""
    tokenizer = tokenizer_of_mistral()
    return mistral3_with(mistral3_decoder(tokenizer), tokenizer, template="mistral_v7")


def mistral4() -> Parts:
    """Mistral-Small-4: latent attention and experts inside Mistral-3; there is no q_proj, k_proj or v_proj."""
    tokenizer = tokenizer_of_mistral()
    ranks = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    sizes = DECODER | {"num_key_value_heads": 4}
    decoder = Mistral4Config(vocab_size=len(tokenizer), **ranks, **experts, **sizes, **token_ids(tokenizer))
    return mistral3_with(decoder, tokenizer, template="mistral_v7")


def magistral() -> Parts:
    """Magistral-Small-2509: the folder holds tekken.json, no tokenizer.json and no chat template."""
    tokenizer = tokenizer_of_mistral()
    image = {"image_patch_size": 8, "max_image_size": 64, "spatial_merge_size": 2}
    return mistral3_with(mistral3_decoder(tokenizer), tokenizer, tekken=tekken("v11", image=image))


def voxtral() -> Parts:
    """Voxtral: 375 tokens for each started 30 seconds of sound; tekken.json only, read by mistral-common."""
    try:
        import mistral_common  # noqa: F401
        import soundfile  # noqa: F401
    except ImportError as error:
        raise ImportError("voxtral's processor needs mistral-common[audio]: pip install 'mistral-common[audio]'") from error

    tokenizer = tokenizer_of_mistral()
    config = VoxtralConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), head_dim=16, **DECODER, **token_ids(tokenizer)),
        audio_config=dict(**{**TOWER, "intermediate_size": 128}),  # the projector reads four frames of 32 as one
        audio_token_id=SPECIAL.index("[AUDIO]"),
    )
    extractor = WhisperFeatureExtractor(feature_size=128)
    extractor.processor_class = "VoxtralProcessor"  # as in the published preprocessor_config.json
    spectrogram = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    audio = {"sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": spectrogram, "chunk_length_s": 30.0}
    return Parts(config, extractor, ("</s>",), tokenizer=tokenizer, tekken=tekken("v7", audio=audio))

"""The Gemma line: text-only Gemma-3, Gemma-3, Gemma-3n, Gemma-4."""

from transformers import (
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GemmaTokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.zoo.checkpoint import DECODER, TOWER, Parts
from tests.zoo.vocabulary import sentencepiece, special, token_ids

TURNS = ("<start_of_turn>", "<end_of_turn>")
STOP = ("<eos>", "<end_of_turn>")
SQUARE = {"height": 32, "width": 32}
IN_TURN = ["sliding_attention", "full_attention"]


def tokenizer_with(*last: str, **named: str) -> GemmaTokenizer:
    """Gemma's tokenizer; `named` are the media tokens that its processor asks for by name, such as image_token."""
    vocabulary, merges = sentencepiece(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate((*last, *named.values()))}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens=named)
    return special(tokenizer, last)


def gemma3_decoder(tokenizer) -> dict:
    """Gemma-3's text configuration: sliding and full attention in turn."""
    window = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=32, layer_types=IN_TURN)
    return dict(vocab_size=len(tokenizer), **window, **DECODER, **token_ids(tokenizer))


def gemma3_text() -> Parts:
    """Gemma-3 1B, without pictures; here with the soft cap on the logits that Gemma-2 and Gemma-4 have."""
    tokenizer = tokenizer_with(*TURNS)
    config = Gemma3TextConfig(final_logit_softcapping=30.0, **gemma3_decoder(tokenizer))
    return Parts(config, tokenizer, STOP, template="gemma3")


def gemma3() -> Parts:
    """Gemma-3: 4 tokens a picture, which see each other in both directions."""
    tokenizer = tokenizer_with(
        *TURNS, boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    config = Gemma3Config(
        text_config=gemma3_decoder(tokenizer),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, vision_use_head=False, **TOWER),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    return Parts(config, processor, STOP, template="gemma3")


def gemma3n() -> Parts:
    """Gemma-3n: a convolutional tower from timm, audio, per-layer inputs, keys and values shared by the last layers."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError("gemma3n's vision tower comes from timm: pip install timm") from error

    # The ids of a medium's end and of its soft token lie behind the text's: the model embeds them by tables of their own.
    media = dict(eoi_token="<end_of_image>", image_token="<image_soft_token>")
    media |= dict(eoa_token="<end_of_audio>", audio_token="<audio_soft_token>")
    tokenizer = tokenizer_with(*TURNS, boi_token="<start_of_image>", boa_token="<start_of_audio>", **media)
    text_size = tokenizer.eoi_token_id
    config = Gemma3nConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            vocab_size_per_layer_input=text_size,
            hidden_size_per_layer_input=16,
            head_dim=16,
            sliding_window=32,
            layer_types=IN_TURN * 2,
            num_kv_shared_layers=2,
            altup_num_inputs=2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
            **{**DECODER, "num_hidden_layers": 4},
            **token_ids(tokenizer),
        ),
        vision_config=dict(
            hidden_size=2048,
            vocab_size=2,
            vocab_offset=text_size,
            model_args={"channel_multiplier": 0.02, "msfa_output_resolution": 4},
        ),
        audio_config=dict(
            hidden_size=32,
            vocab_size=2,
            vocab_offset=text_size + 2,
            conf_num_attention_heads=2,
            conf_num_hidden_layers=2,
            sscp_conv_channel_size=(8, 4),
        ),
        vision_soft_tokens_per_image=16,
        audio_soft_tokens_per_image=188,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("boi_token", "boa_token", *media)},
    )
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer,
        audio_seq_length=188,
        image_seq_length=16,
    )
    return Parts(config, processor, STOP, template="gemma3n")


def gemma4(decoder: dict, tower: dict, audio: dict | None, template: str) -> Parts:
    """A Gemma-4 variant: 2-D positions of patches, 9 patches to a token, at most 70 tokens a picture."""
    named = dict(boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>")
    named |= dict(boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>")
    turns = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_response>", "<|video|>")
    tokenizer = tokenizer_with(*turns, **named)
    config = Gemma4Config(
        text_config=dict(
            vocab_size=len(tokenizer),
            vocab_size_per_layer_input=len(tokenizer),
            head_dim=16,
            global_head_dim=32,
            sliding_window=32,
            final_logit_softcapping=30.0,
            **{**DECODER, **decoder},
            **token_ids(tokenizer),
        ),
        vision_config=dict(
            patch_size=4, head_dim=16, num_key_value_heads=2, position_embedding_size=256, **TOWER, **tower
        ),
        audio_config=audio,
        eoa_token_index=tokenizer.eoa_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in named if name != "eoa_token"},
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer,
        Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70),
        image_seq_length=70,
    )
    return Parts(config, processor, stop=("<eos>", "<turn|>", "<|tool_response>"), template=template)


def gemma4_e2b() -> Parts:
    """Gemma-4 E2B: audio, inputs per layer, keys and values shared by the last layers, clipped linear layers."""
    decoder = dict(num_hidden_layers=4, layer_types=IN_TURN * 2, num_kv_shared_layers=2, use_double_wide_mlp=True)
    decoder |= dict(hidden_size_per_layer_input=16)
    audio = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, subsampling_conv_channels=[128, 4])
    return gemma4(decoder, dict(use_clipped_linears=True), dict(output_proj_dims=64, **audio), "gemma4")


def gemma4_moe() -> Parts:
    """Gemma-4 26B-A4B: experts, pictures that see themselves in both directions, no audio; an empty thought is prompted."""
    decoder = dict(layer_types=IN_TURN, use_bidirectional_attention="vision", hidden_size_per_layer_input=0)
    decoder |= dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
    decoder |= dict(attention_k_eq_v=True, num_global_key_value_heads=1)
    return gemma4(decoder, dict(standardize=True), None, "gemma4_thinking")

"""The Gemma line: text-only Gemma-3, Gemma-3, Gemma-3n, Gemma-4, PaliGemma."""

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
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.zoo.checkpoint import Parts, decoder, require, tower
from tests.zoo.vocabulary import sentencepiece, special

TURNS = ("<start_of_turn>", "<end_of_turn>")
STOP = ("<eos>", "<end_of_turn>")
IN_TURN = ["sliding_attention", "full_attention"]


def tokenizer_with(*last: str, **named: str) -> GemmaTokenizer:
    """Gemma's tokenizer; `named` are the tokens that the processor asks for by name, such as image_token."""
    vocabulary, merges = sentencepiece(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate((*last, *named.values()))}
    saved = dict(add_bos_token=True, extra_special_tokens=named)
    return special(GemmaTokenizer(vocab=vocabulary, merges=merges, **saved), last)


def named_ids(tokenizer, *names: str) -> dict[str, int]:
    """{boi_token_id: ...} for the names of tokens, as a configuration spells them."""
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names}


def gemma3_decoder(tokenizer, **more) -> dict:
    """Gemma-3's text configuration: sliding and full attention in turn."""
    window = dict(query_pre_attn_scalar=16, sliding_window=32, layer_types=IN_TURN)
    return decoder(tokenizer, head_dim=16, **window, **more)


def gemma3_text() -> Parts:
    """Gemma-3 1B, without pictures; here with the soft cap on logits that Gemma-2 and Gemma-4 have."""
    tokenizer = tokenizer_with(*TURNS)
    config = Gemma3TextConfig(**gemma3_decoder(tokenizer, final_logit_softcapping=30.0))
    return Parts(config, tokenizer, STOP, template="gemma3")


def gemma3() -> Parts:
    """Gemma-3: 4 tokens a picture, which see each other in both directions."""
    named = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tokenizer = tokenizer_with(*TURNS, **named)
    config = Gemma3Config(
        text_config=gemma3_decoder(tokenizer),
        vision_config=SiglipVisionConfig(**tower(image_size=32, patch_size=8, vision_use_head=False)),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    image_processor = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Parts(config, Gemma3Processor(image_processor, tokenizer, image_seq_length=4), STOP, "gemma3")


def paligemma() -> Parts:
    """PaliGemma 2: Gemma-2 behind SigLIP, 16 tokens a picture, and tokens of its processor's for places."""
    tokenizer = tokenizer_with()
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        text_config=gemma3_decoder(tokenizer, model_type="gemma2", attn_logit_softcapping=50.0),
        vision_config=tower(model_type="siglip_vision_model", image_size=32, patch_size=8, vision_use_head=False),
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
    )
    return Parts(config, processor, ("<eos>",))


def gemma3n() -> Parts:
    """Gemma-3n: a convolutional tower, audio, inputs per layer, keys and values shared by the last layers."""
    require("timm", needed_by="gemma3n's vision tower", pip="timm")
    # The ids of a medium's end and soft token lie behind the text's: tables of their own embed them.
    media = dict(eoi_token="<end_of_image>", image_token="<image_soft_token>")
    media |= dict(eoa_token="<end_of_audio>", audio_token="<audio_soft_token>")
    tokenizer = tokenizer_with(*TURNS, boi_token="<start_of_image>", boa_token="<start_of_audio>", **media)
    text_size = tokenizer.eoi_token_id
    config = Gemma3nConfig(
        text_config=decoder(
            tokenizer,
            head_dim=16,
            num_hidden_layers=4,
            sliding_window=32,
            layer_types=IN_TURN * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=text_size,
            altup_num_inputs=2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        ),
        vision_config=dict(
            vocab_size=2,
            vocab_offset=text_size,
            model_args={"channel_multiplier": 0.02, "msfa_output_resolution": 4},
        ),
        audio_config=dict(
            vocab_size=2,
            vocab_offset=text_size + 2,
            hidden_size=32,
            conf_num_attention_heads=2,
            conf_num_hidden_layers=2,
            sscp_conv_channel_size=(8, 4),
        ),
        vision_soft_tokens_per_image=16,
        **named_ids(tokenizer, "boi_token", "boa_token", *media),
    )
    image_processor = SiglipImageProcessor(size={"height": 64, "width": 64})
    extractor = Gemma3nAudioFeatureExtractor()
    processor = Gemma3nProcessor(extractor, image_processor, tokenizer, image_seq_length=16)
    return Parts(config, processor, STOP, template="gemma3n")


def gemma4(template: str, text: dict, vision: dict, audio: dict | None) -> Parts:
    """A Gemma-4 variant: patches with 2-D positions, 9 of them a token, at most 70 tokens a picture."""
    turns = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_response>", "<|video|>")
    image = dict(boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>")
    sound = dict(boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>")
    tokenizer = tokenizer_with(*turns, **image, **sound)
    shared = dict(head_dim=16, global_head_dim=32, sliding_window=32, final_logit_softcapping=30.0)
    patches = dict(patch_size=4, position_embedding_size=256, head_dim=16, num_key_value_heads=2)
    config = Gemma4Config(
        text_config=decoder(tokenizer, vocab_size_per_layer_input=len(tokenizer), **shared, **text),
        vision_config=tower(**patches, **vision),
        audio_config=audio,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=tokenizer.eoa_token_id,
        **named_ids(tokenizer, *image, "boa_token", "audio_token"),
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
    """Gemma-4 E2B: audio, inputs per layer, keys and values shared by the last layers, clipped linears."""
    text = dict(num_hidden_layers=4, layer_types=IN_TURN * 2, num_kv_shared_layers=2)
    text |= dict(hidden_size_per_layer_input=16, use_double_wide_mlp=True)
    audio = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, output_proj_dims=64)
    audio |= dict(subsampling_conv_channels=[128, 4])  # the first must be as many as the mel bands
    return gemma4("gemma4", text, dict(use_clipped_linears=True), audio)


def gemma4_moe() -> Parts:
    """Gemma-4 26B-A4B: experts, pictures seen in both directions, no audio; prompts open an empty thought."""
    text = dict(layer_types=IN_TURN, use_bidirectional_attention="vision", hidden_size_per_layer_input=0)
    text |= dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
    text |= dict(attention_k_eq_v=True, num_global_key_value_heads=1)
    return gemma4("gemma4_thinking", text, dict(standardize=True), audio=None)

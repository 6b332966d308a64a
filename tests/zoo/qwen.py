"""The Qwen line: text-only Qwen-3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5."""

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5Tokenizer,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.zoo.checkpoint import Parts, decoder
from tests.zoo.vocabulary import byte_level, special

STOP = ("<|im_end|>", "<|endoftext|>")
MEDIA = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
PICTURES = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}  # 4 to 16 tokens
CLIPS = {"patch_size": 8, "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 8 * 64 * 64}}  # all frames
TOWER = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, out_hidden_size=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def tokenizer_with(*last: str, tokenizer_class=Qwen2Tokenizer, **named: str):
    """Qwen's tokenizer, special tokens last; `named` are those that a processor asks for by name."""
    vocabulary, merges = byte_level()
    vocabulary["<|endoftext|>"] = len(vocabulary)
    saved = dict(pad_token="<|endoftext|>", extra_special_tokens=named)
    tokenizer = tokenizer_class(vocab=vocabulary, merges=merges, **saved)
    special(tokenizer, ("<|im_start|>", "<|im_end|>", *last)).eos_token = "<|im_end|>"
    return tokenizer


def qwen_text() -> Parts:
    """Qwen-3, without pictures."""
    tokenizer = tokenizer_with()
    config = Qwen3Config(**decoder(tokenizer, head_dim=16, tie_word_embeddings=True))
    return Parts(config, tokenizer, STOP, template="qwen3")


def configure(config_class, tokenizer, vision: dict, mrope_section: list[int], rotary=1.0, **text):
    """A configuration with positions in three rows: `mrope_section` is the pairs of time, height, width."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section}
    if config_class not in (Qwen2VLConfig, Qwen2_5_VLConfig):
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": rotary}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA.items()}
    text_config = decoder(tokenizer, rope_parameters=rope, **text)
    return config_class(text_config=text_config, vision_config=vision, **ids)


def qwen2_vl() -> Parts:
    """Qwen2-VL: pictures of any size, in grids of patches."""
    tokenizer = tokenizer_with(*MEDIA.values())
    vision = dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=8)
    config = configure(Qwen2VLConfig, tokenizer, vision, [2, 3, 3])
    image_processor, video_processor = Qwen2VLImageProcessor(**PICTURES), Qwen2VLVideoProcessor(**PICTURES)
    return Parts(config, Qwen2VLProcessor(image_processor, tokenizer, video_processor), STOP, "qwen2_vl")


def qwen2_5_vl() -> Parts:
    """Qwen2.5-VL: windowed attention in the tower; positions of clips in seconds."""
    tokenizer = tokenizer_with(*MEDIA.values())
    vision = dict(window_size=32, fullatt_block_indexes=[1], **TOWER)
    config = configure(Qwen2_5_VLConfig, tokenizer, vision, [2, 3, 3])
    image_processor, video_processor = Qwen2VLImageProcessor(**PICTURES), Qwen2VLVideoProcessor(**PICTURES)
    return Parts(config, Qwen2_5_VLProcessor(image_processor, tokenizer, video_processor), STOP, "qwen2_vl")


def qwen3_processor(tokenizer) -> Qwen3VLProcessor:
    """The processor of Qwen3-VL and Qwen3.5."""
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**PICTURES), tokenizer, Qwen3VLVideoProcessor(**CLIPS))


def qwen3_vl(config_class=Qwen3VLConfig, **experts) -> Parts:
    """Qwen3-VL: an early tower layer's features are added to an early language layer."""
    tokenizer = tokenizer_with(*MEDIA.values())
    vision = dict(num_position_embeddings=16, deepstack_visual_indexes=[0], **TOWER)
    config = configure(config_class, tokenizer, vision, [4, 2, 2], head_dim=16, **experts)
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_vl")


def qwen3_vl_moe() -> Parts:
    """Qwen3-VL with experts."""
    return qwen3_vl(Qwen3VLMoeConfig, **EXPERTS)


def qwen3_5(config_class=Qwen3_5Config, **experts) -> Parts:
    """Qwen3.5: linear attention in three layers of four; replies open with a thought, which history drops."""
    tokenizer = tokenizer_with(*MEDIA.values(), "<think>", "</think>", tokenizer_class=Qwen3_5Tokenizer)
    linear = dict(linear_key_head_dim=16, linear_value_head_dim=16)
    linear |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
    text = dict(num_hidden_layers=4, head_dim=32, rotary=0.25)  # 8 of 32 dimensions turn, in 4 pairs
    vision = dict(num_position_embeddings=16, **TOWER)
    config = configure(config_class, tokenizer, vision, [2, 1, 1], **text, **linear, **experts)
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_5")


def qwen3_5_moe() -> Parts:
    """Qwen3.5 with experts, one of them shared."""
    return qwen3_5(Qwen3_5MoeConfig, shared_expert_intermediate_size=32, **EXPERTS)

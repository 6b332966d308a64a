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

from tests.zoo.checkpoint import DECODER, Parts
from tests.zoo.vocabulary import byte_level, special, token_ids

TURNS = ("<|im_start|>", "<|im_end|>")
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STOP = ("<|im_end|>", "<|endoftext|>")
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "out_hidden_size": 64}
PICTURES = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}  # 4 to 16 tokens of 16x16
CLIPS = {"patch_size": 8, "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 8 * 64 * 64}}  # of all frames together
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def tokenizer_with(*last: str, tokenizer_class=Qwen2Tokenizer, **named: str):
    """Qwen's tokenizer, whose special tokens follow the vocabulary."""
    vocabulary, merges = byte_level()
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = tokenizer_class(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", extra_special_tokens=named)
    special(tokenizer, last).eos_token = "<|im_end|>"
    return tokenizer


def decoder(tokenizer, mrope_section: list[int], interleaved: bool = False, **more) -> dict:
    """A text configuration with rope in three rows: time, height, width."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section}
    if interleaved:
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": more.pop("partial_rotary_factor", 1.0)}
    return dict(vocab_size=len(tokenizer), rope_parameters=rope, **{**DECODER, **more}, **token_ids(tokenizer))


def media_ids(tokenizer) -> dict[str, int]:
    """The ids that a configuration of the line names."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen_text() -> Parts:
    """Qwen-3, without pictures."""
    tokenizer = tokenizer_with(*TURNS)
    sizes = dict(vocab_size=len(tokenizer), head_dim=16, **DECODER)
    config = Qwen3Config(tie_word_embeddings=True, **sizes, **token_ids(tokenizer))
    return Parts(config, tokenizer, STOP, template="qwen3")


def qwen2_vl() -> Parts:
    """Qwen2-VL: pictures of any size in grids of patches, positions in three rows."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA)
    config = Qwen2VLConfig(
        text_config=decoder(tokenizer, [2, 3, 3]),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=8),
        **media_ids(tokenizer),
    )
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**PICTURES), tokenizer, Qwen2VLVideoProcessor(**PICTURES))
    return Parts(config, processor, STOP, template="qwen2_vl")


def qwen2_5_vl() -> Parts:
    """Qwen2.5-VL: windowed attention in the tower, seconds as positions of clips."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA)
    config = Qwen2_5_VLConfig(
        text_config=decoder(tokenizer, [2, 3, 3]),
        vision_config=dict(window_size=32, fullatt_block_indexes=[1], **TOWER),
        **media_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**PICTURES), tokenizer, Qwen2VLVideoProcessor(**PICTURES))
    return Parts(config, processor, STOP, template="qwen2_vl")


def qwen3_processor(tokenizer) -> Qwen3VLProcessor:
    """The processor of Qwen3-VL and Qwen3.5."""
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**PICTURES), tokenizer, Qwen3VLVideoProcessor(**CLIPS))


def qwen3_vl() -> Parts:
    """Qwen3-VL: features of an early tower layer are added to an early language layer."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA)
    config = Qwen3VLConfig(
        text_config=decoder(tokenizer, [4, 2, 2], interleaved=True, head_dim=16),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0], **TOWER),
        **media_ids(tokenizer),
    )
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_vl")


def qwen3_vl_moe() -> Parts:
    """Qwen3-VL with experts."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA)
    config = Qwen3VLMoeConfig(
        text_config=decoder(tokenizer, [4, 2, 2], interleaved=True, head_dim=16, **EXPERTS),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0], **TOWER),
        **media_ids(tokenizer),
    )
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_vl")


def qwen3_5_decoder(tokenizer, **more) -> dict:
    """Qwen3.5's text configuration: three layers of linear attention and one of full."""
    linear = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)
    rope = dict(head_dim=32, partial_rotary_factor=0.25)  # 8 of 32 dimensions turn, in 4 pairs
    return decoder(tokenizer, [2, 1, 1], interleaved=True, num_hidden_layers=4, **rope, **linear, **more)


def qwen3_5() -> Parts:
    """Qwen3.5: linear attention; its template opens each reply with a block of thought and drops those of earlier turns."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA, "<think>", "</think>", tokenizer_class=Qwen3_5Tokenizer)
    config = Qwen3_5Config(
        text_config=qwen3_5_decoder(tokenizer),
        vision_config=dict(num_position_embeddings=16, **TOWER),
        **media_ids(tokenizer),
    )
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_5")


def qwen3_5_moe() -> Parts:
    """Qwen3.5 with experts, one of them shared."""
    tokenizer = tokenizer_with(*TURNS, *MEDIA, "<think>", "</think>", tokenizer_class=Qwen3_5Tokenizer)
    config = Qwen3_5MoeConfig(
        text_config=qwen3_5_decoder(tokenizer, shared_expert_intermediate_size=32, **EXPERTS),
        vision_config=dict(num_position_embeddings=16, **TOWER),
        **media_ids(tokenizer),
    )
    return Parts(config, qwen3_processor(tokenizer), STOP, template="qwen3_5")

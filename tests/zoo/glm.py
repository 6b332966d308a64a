"""The GLM line: GLM-4.1V and GLM-4.6V-Flash (glm4v), GLM-4.6V (glm46v), GLM-4.5V (glm4v_moe)."""

from transformers import (
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
)

from tests.zoo.checkpoint import DECODER, Parts
from tests.zoo.vocabulary import gpt_like, token_ids

TURNS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>")
MEDIA = {
    "image_token_id": "<|image|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_token_id": "<|video|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
STOP = ("<|endoftext|>", "<|user|>", "<|observation|>")  # a reply ends where the next turn's header begins
PICTURES = {"patch_size": 8, "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 64 * 64}}  # counted as 2 frames
CLIPS = {"patch_size": 8, "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 8 * 64 * 64}}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
TOWER |= {"image_size": 32, "out_hidden_size": 64}


def build(config_class, processor_classes: tuple, template: str, **more) -> Parts:
    """A GLM variant; `more` goes into its text configuration."""
    tokenizer = gpt_like(
        last=("<|endoftext|>", *TURNS, *MEDIA.values()), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    config = config_class(
        text_config=dict(
            vocab_size=len(tokenizer), rope_parameters=rope, **DECODER, **more, **token_ids(tokenizer)
        ),
        vision_config=TOWER,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA.items()},
    )
    image_processor_class, video_processor_class, processor_class = processor_classes
    processor = processor_class(image_processor_class(**PICTURES), tokenizer, video_processor_class(**CLIPS))
    return Parts(config, processor, STOP, template)


def glm4v() -> Parts:
    """GLM-4.1V, GLM-4.6V-Flash: gate and up projection in one linear layer; pad and end of text are one token."""
    return build(Glm4vConfig, (Glm4vImageProcessor, Glm4vVideoProcessor, Glm4vProcessor), "glm4v")


def glm46v() -> Parts:
    """GLM-4.6V with the dense decoder of GLM-4.1V."""
    return build(Glm46VConfig, (Glm46VImageProcessor, Glm46VVideoProcessor, Glm46VProcessor), "glm4_5v")


def glm4v_moe() -> Parts:
    """GLM-4.5V: a dense layer, then experts, one of them shared."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1)
    return build(Glm4vMoeConfig, (Glm4vImageProcessor, Glm4vVideoProcessor, Glm4vProcessor), "glm4_5v", **experts)

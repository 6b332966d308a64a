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

from tests.zoo.checkpoint import Parts, decoder
from tests.zoo.vocabulary import gpt_like

TURNS = "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <think> </think>"
MEDIA = {
    "image_token_id": "<|image|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_token_id": "<|video|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
STOP = ("<|endoftext|>", "<|user|>", "<|observation|>")  # a reply ends where the next turn's header begins
TOWER = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
PICTURES = {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 64 * 64}  # a picture counts as two frames
CLIPS = {"shortest_edge": 8 * 32 * 32, "longest_edge": 8 * 64 * 64}
GLM4V = (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor)
GLM46V = (Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor)


def variant(config_class, processor_classes: tuple, template: str, **text) -> Parts:
    """A GLM variant; `text` goes into its text configuration."""
    named = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer = gpt_like(last=(*TURNS.split(), *MEDIA.values()), **named)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = config_class(
        text_config=decoder(tokenizer, rope_parameters=rope | {"mrope_section": [2, 1, 1]}, **text),
        vision_config=dict(image_size=32, patch_size=8, **TOWER),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA.items()},
    )
    processor_class, image_processor_class, video_processor_class = processor_classes
    image_processor = image_processor_class(patch_size=8, size=PICTURES)
    video_processor = video_processor_class(patch_size=8, size=CLIPS)
    return Parts(config, processor_class(image_processor, tokenizer, video_processor), STOP, template)


def glm4v() -> Parts:
    """GLM-4.1V, GLM-4.6V-Flash: gate and up projection in one linear; one token both pads and ends texts."""
    return variant(Glm4vConfig, GLM4V, "glm4v")


def glm46v() -> Parts:
    """GLM-4.6V with the dense decoder of GLM-4.1V."""
    return variant(Glm46VConfig, GLM46V, "glm4_5v")


def glm4v_moe() -> Parts:
    """GLM-4.5V: a dense layer, then experts, one of them shared."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return variant(Glm4vMoeConfig, GLM4V, "glm4_5v", **experts)

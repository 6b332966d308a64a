"""Real sizes for bench/gpu.py: configurations without a checkpoint, and encoded samples made up for them.

The sizes are those of the published config.json files. No processor is needed: ids, pixels and labels are
noise of the right shapes, and what a step costs doesn't depend on them. Each kind also has tiny sizes, with
which the same code runs in a test.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.collator import IGNORE_INDEX

FIRST_WORD = 300                           # ids below may be special tokens


@dataclass(frozen=True)
class Kind:
    """How a family is configured, and what a picture is to it.

    config: (text sizes, tiny) -> configuration. picture: configuration -> the ids that one picture takes.
    media: (configuration, number of pictures, ids [T]) -> the tensors that go with them.
    """
    config: Callable
    picture: Callable
    media: Callable


# ---- Qwen2.5-VL: a picture of 644 x 644 pixels, 46 x 46 patches, four of them to a token ----

def qwen_config(text: dict, tiny: bool):
    """The tower is the same in all sizes."""
    from transformers import Qwen2_5_VLConfig
    tower = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
                 window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    if tiny:
        tower |= dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1])
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        text_config={"rope_parameters": rope, "max_position_embeddings": 32_768, **text},
        vision_config=tower | {"out_hidden_size": text["hidden_size"]}, image_token_id=text["vocab_size"] - 9,
        video_token_id=text["vocab_size"] - 8, vision_start_token_id=text["vocab_size"] - 12,
        vision_end_token_id=text["vocab_size"] - 11, tie_word_embeddings=text["tie_word_embeddings"])


def qwen_edge(config) -> int:
    """Patches on an edge."""
    return 46 if config.vision_config.depth == 32 else 4


def qwen_picture(config) -> list[int]:
    """Start, placeholders, end."""
    tokens = qwen_edge(config) ** 2 // 4
    return [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]


def qwen_media(config, pictures: int, ids: torch.Tensor) -> dict:
    """Patches of 3 colours x 2 frames x 14 x 14 pixels, and their grid."""
    edge = qwen_edge(config)
    return {"pixel_values": torch.randn(pictures * edge * edge, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, edge, edge]] * pictures),
            "mm_token_type_ids": (ids == config.image_token_id).long()[None]}


# ---- SmolVLM2: five tiles of 384 x 384 pixels, 81 tokens each ----

def smolvlm_config(text: dict, tiny: bool):
    """A Llama, and SigLIP so400m in tiles."""
    from transformers import LlamaConfig, SmolVLMConfig
    tower = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                 image_size=384, patch_size=14)
    if tiny:
        tower |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      image_size=84)
    return SmolVLMConfig(text_config=LlamaConfig(max_position_embeddings=8192, **text), vision_config=tower,
                         scale_factor=3, image_token_id=text["vocab_size"] - 90, pad_token_id=2)


def smolvlm_picture(config) -> list[int]:
    """Placeholders; the few tokens that name rows and columns are left out."""
    vision = config.vision_config
    edge = vision.image_size // vision.patch_size // config.scale_factor
    return [config.image_token_id] * (5 * edge * edge)


def smolvlm_media(config, pictures: int, ids: torch.Tensor) -> dict:
    """Tiles, all of them whole."""
    edge = config.vision_config.image_size
    return {"pixel_values": torch.randn(1, 5 * pictures, 3, edge, edge),
            "pixel_attention_mask": torch.ones(1, 5 * pictures, edge, edge, dtype=torch.long)}


# ---- Gemma-3: a picture of 896 x 896 pixels, 256 tokens ----

def gemma_config(text: dict, tiny: bool):
    """Five sliding layers to a full one, and SigLIP so400m."""
    from transformers import Gemma3Config
    tower = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                 image_size=896, patch_size=14, vision_use_head=False)
    if tiny:
        tower |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      image_size=112)
    size = text["vocab_size"]
    return Gemma3Config(text_config={"sliding_window": 1024, "max_position_embeddings": 131_072, **text},
                        vision_config=tower, mm_tokens_per_image=4 if tiny else 256,
                        boi_token_index=size - 66, eoi_token_index=size - 65, image_token_index=size - 64)


def gemma_picture(config) -> list[int]:
    """Start, placeholders, end."""
    return [config.boi_token_id, *[config.image_token_id] * config.mm_tokens_per_image, config.eoi_token_id]


def gemma_media(config, pictures: int, ids: torch.Tensor) -> dict:
    """Squares, and which tokens are theirs."""
    edge = config.vision_config.image_size
    return {"pixel_values": torch.randn(pictures, 3, edge, edge),
            "token_type_ids": (ids == config.image_token_id).long()[None]}


QWEN = Kind(qwen_config, qwen_picture, qwen_media)
SMOLVLM = Kind(smolvlm_config, smolvlm_picture, smolvlm_media)
GEMMA = Kind(gemma_config, gemma_picture, gemma_media)


def text(width: int, layers: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, tied: bool, **more):
    """The keys of a text configuration."""
    return dict(hidden_size=width, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, **more)


MODELS = {
    "Qwen2.5-VL-3B": (QWEN, text(2048, 36, 11_008, 16, 2, 151_936 - 272, True)),
    "SmolVLM2-2.2B": (SMOLVLM, text(2048, 24, 8192, 32, 32, 49_280, False)),
    "Gemma-3-4B": (GEMMA, text(2560, 34, 10_240, 8, 4, 262_208, True, head_dim=256)),
    "Qwen2.5-VL-7B": (QWEN, text(3584, 28, 18_944, 28, 4, 152_064, False)),
}
TINY = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=1024)


def configuration(name: str, tiny: bool):
    """The configuration of a model of MODELS."""
    kind, sizes = MODELS[name]
    sizes = sizes | (TINY | ({"head_dim": 16} if "head_dim" in sizes else {}) if tiny else {})
    return kind.config(sizes, tiny)


def sample(name: str, config, tokens: int, pictures: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
    """The tensors of one sample of so many tokens, as Encoder gives them; its last words train."""
    kind, vocabulary = MODELS[name][0], config.get_text_config().vocab_size
    picture = kind.picture(config) * pictures
    words = torch.randint(FIRST_WORD, vocabulary - 100, (tokens - len(picture),), generator=chance)
    ids = torch.cat([words[:4], torch.tensor(picture, dtype=torch.long), words[4:]])                 # [T]
    labels = ids.clone()
    labels[:len(picture) + len(words) // 2] = IGNORE_INDEX
    media = kind.media(config, pictures, ids) if pictures else {}
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": labels[None],
            **media}

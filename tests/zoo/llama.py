"""The Llama line: text-only Llama-3.1, LLaVA-1.5, Llama-3.2-Vision, Llama-4."""

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Llama4Config,
    Llama4ImageProcessor,
    Llama4Processor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaProcessor,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
)

from tests.zoo.checkpoint import DECODER, TOWER, Parts
from tests.zoo.vocabulary import gpt_like, sentencepiece, special, token_ids

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>")
LLAMA3 += ("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
LLAMA3_NAMED = {"bos_token": LLAMA3[0], "eos_token": "<|eot_id|>", "pad_token": LLAMA3[2], "add_bos_token": True}
LLAMA3_STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
SQUARE = {"height": 32, "width": 32}


def llama_text() -> Parts:
    """Llama-3.1, without pictures."""
    tokenizer = gpt_like(last=LLAMA3, **LLAMA3_NAMED)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **DECODER, **token_ids(tokenizer))
    return Parts(config, tokenizer, LLAMA3_STOP, template="llama3")


def llava() -> Parts:
    """LLaVA-1.5: every picture a square of 16 tokens; <image> and <pad> follow the Llama-2 vocabulary."""
    vocabulary, merges = sentencepiece(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens={"image_token": "<image>"}
    )
    special(tokenizer, ("<pad>",)).pad_token = "<pad>"
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **DECODER, **token_ids(tokenizer)),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=32, **TOWER),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which "default" leaves out again
    )
    return Parts(config, processor, stop=("</s>",), template="llava")


def mllama() -> Parts:
    """Llama-3.2-Vision: cross-attention; a picture is one token, whose id no row of the output head has."""
    tokenizer = gpt_like(last=(*LLAMA3, "<|image|>"), **LLAMA3_NAMED)
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    config = MllamaConfig(
        text_config=dict(
            vocab_size=image_id, cross_attention_layers=[1], **{**DECODER, "num_hidden_layers": 3}, **token_ids(tokenizer)
        ),
        vision_config=dict(
            image_size=32,
            patch_size=8,
            max_num_tiles=4,
            num_global_layers=1,
            intermediate_layers_indices=[0],
            vision_output_dim=64,  # the last layer's 32 and those of one intermediate layer
            attention_heads=2,
            **{name: size for name, size in TOWER.items() if name != "num_attention_heads"},
        ),
        image_token_index=image_id,
    )
    processor = MllamaProcessor(MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)
    return Parts(config, processor, LLAMA3_STOP, template="llama3_2_vision")


def llama4() -> Parts:
    """Llama-4 Scout: experts in every layer, a layer without rope, tiles with separators between them."""
    pictures = ("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>")
    tokenizer = gpt_like(
        last=("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>")
        + (*pictures, "<|finetune_right_pad|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        add_bos_token=True,
    )
    id_of = tokenizer.convert_tokens_to_ids
    config = Llama4Config(
        text_config=dict(
            vocab_size=len(tokenizer),
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=4,
            **{**DECODER, "num_hidden_layers": 4},
            **token_ids(tokenizer),
        ),
        vision_config=dict(
            image_size=32,
            patch_size=8,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=64,
            projector_output_dim=64,
            vision_output_dim=64,
            **{**TOWER, "intermediate_size": 128},  # four patches of 32 shuffled into one
        ),
        boi_token_index=id_of("<|image_start|>"),
        eoi_token_index=id_of("<|image_end|>"),
        image_token_index=id_of("<|patch|>"),
    )
    processor = Llama4Processor(
        Llama4ImageProcessor(size=SQUARE, max_patches=4), tokenizer, patch_size=8, pixel_shuffle_ratio=0.5
    )
    return Parts(config, processor, stop=("<|end_of_text|>", "<|eom|>", "<|eot|>"), template="llama4")

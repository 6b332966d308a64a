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

from tests.zoo.checkpoint import Parts, decoder, tower
from tests.zoo.vocabulary import gpt_like, sentencepiece, special

SQUARE = {"height": 32, "width": 32}
STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def llama3_tokenizer(*more: str):
    """Llama-3's tokenizer; its special tokens, and `more`, follow the vocabulary."""
    texts = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    return gpt_like(
        last=(*texts, *turns, *more),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        add_bos_token=True,
    )


def llama_text() -> Parts:
    """Llama-3.1, without pictures."""
    tokenizer = llama3_tokenizer()
    config = LlamaConfig(**decoder(tokenizer, tie_word_embeddings=True))
    return Parts(config, tokenizer, STOP, template="llama3")


def llava() -> Parts:
    """LLaVA-1.5: every picture a square of 16 tokens; <image> and <pad> follow the Llama-2 vocabulary."""
    vocabulary, merges = sentencepiece(("<unk>", "<s>", "</s>"))
    saved = dict(add_bos_token=True, padding_side="left", extra_special_tokens={"image_token": "<image>"})
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, **saved)
    special(tokenizer, ("<pad>",)).pad_token = "<pad>"
    config = LlavaConfig(
        text_config=LlamaConfig(**decoder(tokenizer)),
        vision_config=CLIPVisionConfig(**tower(image_size=32, patch_size=8, projection_dim=32)),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which "default" leaves out again
    )
    return Parts(config, processor, stop=("</s>",), template="llava")


def mllama() -> Parts:
    """Llama-3.2-Vision: cross-attention; a picture is one token, whose id has no row in the output head."""
    tokenizer = llama3_tokenizer("<|image|>")
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = tower(image_size=32, patch_size=8, max_num_tiles=4, num_global_layers=1)
    vision["attention_heads"] = vision.pop("num_attention_heads")
    config = MllamaConfig(
        text_config=decoder(tokenizer, vocab_size=image_id, num_hidden_layers=3, cross_attention_layers=[1]),
        # The tower gives its last layer's 32 features and those of the intermediate layers named.
        vision_config=vision | dict(intermediate_layers_indices=[0], vision_output_dim=64),
        image_token_index=image_id,
    )
    processor = MllamaProcessor(MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)
    return Parts(config, processor, STOP, template="llama3_2_vision")


def llama4() -> Parts:
    """Llama-4 Scout: experts in every layer, a layer without rope, tiles with separators between them."""
    turns = "<|begin_of_text|> <|end_of_text|> <|header_start|> <|header_end|> <|eom|> <|eot|>"
    media = "<|image_start|> <|image_end|> <|tile_x_separator|> <|tile_y_separator|> <|image|> <|patch|>"
    tokenizer = gpt_like(
        last=(*turns.split(), *media.split(), "<|finetune_right_pad|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        add_bos_token=True,
    )
    start_id, end_id, *_, patch_id = tokenizer.convert_tokens_to_ids(media.split())
    experts = dict(intermediate_size_mlp=128, num_local_experts=4)
    projector = dict(projector_input_dim=64, projector_output_dim=64, vision_output_dim=64)
    config = Llama4Config(
        text_config=decoder(tokenizer, num_hidden_layers=4, head_dim=16, **experts),
        # Four patches of 32 features are shuffled into one of 128.
        vision_config=tower(image_size=32, patch_size=8, intermediate_size=128, **projector),
        boi_token_index=start_id,
        eoi_token_index=end_id,
        image_token_index=patch_id,
    )
    image_processor = Llama4ImageProcessor(size=SQUARE, max_patches=4)
    processor = Llama4Processor(image_processor, tokenizer, patch_size=8, pixel_shuffle_ratio=0.5)
    return Parts(config, processor, stop=("<|end_of_text|>", "<|eom|>", "<|eot|>"), template="llama4")

"""Families that stand alone: SmolVLM2, LFM2-VL, InternVL-3.5, PaddleOCR-VL, MiniCPM-V."""

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlamaConfig,
    LlamaTokenizer,
    MiniCPMV4_6Config,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    Qwen3_5TextConfig,
    Qwen3Config,
    Siglip2VisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.zoo import qwen
from tests.zoo.checkpoint import Parts, decoder, require, tower
from tests.zoo.vocabulary import gpt_like, sentencepiece, special


def smolvlm2() -> Parts:
    """SmolVLM2: tiles of 4 tokens, each after its row and column, and the whole picture once more."""
    require("num2words", needed_by="smolvlm2's processor", pip="num2words")
    tokenizer = gpt_like(
        first=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        last=tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
    )
    config = SmolVLMConfig(
        text_config=LlamaConfig(**decoder(tokenizer)),
        vision_config=tower(image_size=32, patch_size=8),
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sizes = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    image_processor, video_processor = SmolVLMImageProcessor(**sizes), SmolVLMVideoProcessor(**sizes)
    processor = SmolVLMProcessor(image_processor, tokenizer, video_processor, image_seq_len=4)
    return Parts(config, processor, stop=("<end_of_utterance>",), template="smolvlm")


def lfm2_vl() -> Parts:
    """LFM2-VL: convolutions between attention layers; large pictures in tiles, small ones as they are."""
    tokenizer = gpt_like(
        first=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        last=tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        add_bos_token=True,
        extra_special_tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
    )
    layers = dict(num_hidden_layers=4, full_attn_idxs=[1, 3], block_multiple_of=16)
    config = Lfm2VlConfig(
        text_config=Lfm2Config(**decoder(tokenizer, **layers)),
        vision_config=Siglip2VisionConfig(**tower(num_patches=16, patch_size=8, vision_use_head=False)),
        projector_hidden_size=64,
        image_token_id=tokenizer.image_token_id,
    )
    tokens = dict(min_image_tokens=4, max_image_tokens=8)
    image_processor = Lfm2VlImageProcessor(encoder_patch_size=8, tile_size=32, max_tiles=4, **tokens)
    processor = Lfm2VlProcessor(image_processor, tokenizer)
    return Parts(config, processor, stop=("<|im_end|>", "<|endoftext|>"), template="lfm2_vl")


def internvl() -> Parts:
    """InternVL-3.5 (-HF): tiles of 4 tokens and a thumbnail; padded on the left unless told otherwise."""
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    tokenizer = qwen.tokenizer_with(**named, video_token="<video>")
    config = InternVLConfig(
        text_config=Qwen3Config(**decoder(tokenizer, head_dim=16)),
        vision_config=tower(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    square = {"height": 32, "width": 32}
    image_processor = GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4)
    video_processor = InternVLVideoProcessor(size=square)
    processor = InternVLProcessor(image_processor, tokenizer, video_processor, image_seq_length=4)
    return Parts(config, processor, qwen.STOP, template="internvl")


def paddleocr_vl() -> Parts:
    """PaddleOCR-VL: a tower for pages of any size and a small Ernie-4.5, with positions in three rows."""
    vocabulary, merges = sentencepiece(("<unk>", "<s>", "</s>"))
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=named)
    media = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>")
    special(tokenizer, ("<|begin_of_sentence|>", "<|end_of_sentence|>", *media)).pad_token = "<unk>"
    start_id, end_id, video_id = tokenizer.convert_tokens_to_ids(list(media))
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}
    config = PaddleOCRVLConfig(
        text_config=decoder(tokenizer, head_dim=16, rope_parameters=rope),
        vision_config=tower(image_size=32, patch_size=8),
        image_token_id=tokenizer.image_token_id,
        video_token_id=video_id,
        vision_start_token_id=start_id,
        vision_end_token_id=end_id,
        tie_word_embeddings=False,
    )
    image_processor = PaddleOCRVLImageProcessor(**qwen.PICTURES)
    processor = PaddleOCRVLProcessor(image_processor, tokenizer)
    return Parts(config, processor, stop=("</s>",), template="paddleocr_vl")


def minicpmv() -> Parts:
    """MiniCPM-V 4.6: a picture whole and in slices, patches in one line, a Qwen3.5 behind its tower."""
    named = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    named |= dict(image_start_token="<image>", image_end_token="</image>")
    named |= dict(slice_start_token="<slice>", slice_end_token="</slice>")
    named |= dict(image_id_start_token="<image_id>", image_id_end_token="</image_id>")
    tokenizer = qwen.tokenizer_with(**named)
    linear = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)
    config = MiniCPMV4_6Config(
        text_config=Qwen3_5TextConfig(**decoder(tokenizer, num_hidden_layers=4, head_dim=32, **linear)),
        vision_config=tower(image_size=64, patch_size=8),
        insert_layer_id=0,
        image_size=64,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    sizes = dict(patch_size=8, scale_resolution=64, max_slice_nums=4)
    image_processor, video_processor = MiniCPMV4_6ImageProcessor(**sizes), MiniCPMV4_6VideoProcessor(**sizes)
    processor = MiniCPMV4_6Processor(image_processor, video_processor, tokenizer)
    return Parts(config, processor, qwen.STOP, template="minicpmv")

"""Families that stand alone: SmolVLM2, LFM2-VL, InternVL-3.5, PaddleOCR-VL."""

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
    PaddleOCRVLConfig,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    Qwen2Tokenizer,
    Qwen3Config,
    Siglip2VisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.zoo.checkpoint import DECODER, TOWER, Parts
from tests.zoo.vocabulary import byte_level, gpt_like, sentencepiece, special, token_ids


def smolvlm2() -> Parts:
    """SmolVLM2: tiles of 4 tokens, each after its row and column, and the whole picture once more."""
    try:
        import num2words  # noqa: F401
    except ImportError as error:
        raise ImportError("smolvlm2's processor needs num2words: pip install num2words") from error

    places = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = gpt_like(
        first=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        last=places,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    config = SmolVLMConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **DECODER, **token_ids(tokenizer)),
        vision_config=dict(image_size=32, patch_size=8, **TOWER),
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sizes = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes), tokenizer, SmolVLMVideoProcessor(**sizes), image_seq_len=4
    )
    return Parts(config, processor, stop=("<end_of_utterance>",), template="smolvlm")


def lfm2_vl() -> Parts:
    """LFM2-VL: convolutions between the attention layers; a large picture in tiles, a small one in its own shape."""
    places = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = gpt_like(
        first=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        last=places,
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
    decoder = DECODER | {"num_hidden_layers": 4}
    config = Lfm2VlConfig(
        text_config=Lfm2Config(
            vocab_size=len(tokenizer), full_attn_idxs=[1, 3], block_multiple_of=16, **decoder, **token_ids(tokenizer)
        ),
        vision_config=Siglip2VisionConfig(num_patches=16, patch_size=8, vision_use_head=False, **TOWER),
        projector_hidden_size=64,
        image_token_id=tokenizer.image_token_id,
    )
    image_processor = Lfm2VlImageProcessor(
        encoder_patch_size=8, tile_size=32, max_tiles=4, min_image_tokens=4, max_image_tokens=8
    )
    processor = Lfm2VlProcessor(image_processor, tokenizer)
    return Parts(config, processor, stop=("<|im_end|>", "<|endoftext|>"), template="lfm2_vl")


def internvl() -> Parts:
    """InternVL-3.5 (-HF): up to four tiles of 4 tokens and a thumbnail; padded on the left unless told otherwise."""
    vocabulary, merges = byte_level()
    vocabulary["<|endoftext|>"] = len(vocabulary)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens={**named, "video_token": "<video>"}
    )
    special(tokenizer, ("<|im_start|>", "<|im_end|>")).eos_token = "<|im_end|>"
    config = InternVLConfig(
        text_config=Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **DECODER, **token_ids(tokenizer)),
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8], **TOWER),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    square = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=square),
        image_seq_length=4,
    )
    return Parts(config, processor, stop=("<|im_end|>", "<|endoftext|>"), template="internvl")


def paddleocr_vl() -> Parts:
    """PaddleOCR-VL: a tower for pages of any size and a small Ernie-4.5, with positions in three rows."""
    media = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>")
    vocabulary, merges = sentencepiece(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"}
    )
    special(tokenizer, ("<|begin_of_sentence|>", "<|end_of_sentence|>", *media)).pad_token = "<unk>"
    start_id, end_id, video_id = tokenizer.convert_tokens_to_ids(list(media))
    config = PaddleOCRVLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]},
            **DECODER,
            **token_ids(tokenizer),
        ),
        vision_config=dict(image_size=32, patch_size=8, **TOWER),
        image_token_id=tokenizer.image_token_id,
        video_token_id=video_id,
        vision_start_token_id=start_id,
        vision_end_token_id=end_id,
        tie_word_embeddings=False,
    )
    image_processor = PaddleOCRVLImageProcessor(
        patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    return Parts(config, PaddleOCRVLProcessor(image_processor, tokenizer), stop=("</s>",), template="paddleocr_vl")

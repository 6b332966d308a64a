"""demo/make_base: the demo's base model before it has learnt anything: a small LLaVA with random weights.

    python recipes/demo/make_base.py data/demo_base   # then 01_config.py recipes/demo_base.yaml, and so on

Reads:  train.parquet, which recipes/demo/data.py wrote, for the words of the vocabulary.
Writes: init/: config, model.safetensors, tokenizer, processor, chat template: a checkpoint as on the hub.
Source: LLaVA-1.5 (arXiv 2310.03744): CLIP's vision tower, a projector of two layers, Llama's decoder.
Fork me to: try other sizes. They cost time in the demo, too: most of it goes into the picture's 49 tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the kit's root, two folders above this script
from lib.run import terminal
from lib.run.errors import StageError
from lib.run.stage import run_script  # noqa: E402

SEED = 0
SIDE_PIXELS, PATCH_PIXELS = 28, 4          # 7x7 patches
VISION_LAYERS, LANGUAGE_LAYERS = 2, 3      # LoRA adapts the language role alone, so that is the deeper one
HIDDEN, HEADS = 128, 4
# At this width the usual 0.02 is far too small to learn quickly: 1/sqrt(HIDDEN) keeps a layer's scale.
LANGUAGE_SCALE, VISION_SCALE = 0.08, 0.06
VOCABULARY_TOKENS = 600                    # at most: no more words occur
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
LATER = ("Which digit is this?",)          # words that the mix lacks and the demo asks with

# LLaVA-1.5's turns. The trained reply is " 7</s>".
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}
    {%- for part in message.content %}
        {{- '<image>\\n' if part.type == 'image' else part.text }}
    {%- endfor %}
    {{- ' ' if message.role == 'user' else eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def tokenizer_for(texts: list[str]):
    """A byte-level BPE tokenizer with the words of these texts; any other text is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    pad, bos, eos, image = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos,
                                   extra_special_tokens={"image_token": image}, padding_side="right",
                                   clean_up_tokenization_spaces=False)


def processor_with(tokenizer):
    """LLaVA's processor: pictures become 28x28, and <image> as many tokens as there are patches."""
    from transformers import CLIPImageProcessor, LlavaProcessor
    middle = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE_PIXELS}, image_mean=middle, image_std=middle,
                                  crop_size={"height": SIDE_PIXELS, "width": SIDE_PIXELS})
    return LlavaProcessor(pictures, tokenizer, patch_size=PATCH_PIXELS, chat_template=TEMPLATE,
                          vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)  # the class token, which "default" leaves out


def model_for(tokenizer):
    """A LLaVA with random weights."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    vision = CLIPVisionConfig(image_size=SIDE_PIXELS, patch_size=PATCH_PIXELS, hidden_size=HIDDEN,
                              intermediate_size=4 * HIDDEN, num_hidden_layers=VISION_LAYERS,
                              num_attention_heads=HEADS, projection_dim=HIDDEN,
                              initializer_range=VISION_SCALE)
    language = LlamaConfig(vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=352,
                           num_hidden_layers=LANGUAGE_LAYERS, num_attention_heads=HEADS,
                           num_key_value_heads=HEADS, max_position_embeddings=512,
                           initializer_range=LANGUAGE_SCALE, bos_token_id=tokenizer.bos_token_id,
                           eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.image_token_id,
        image_seq_length=(SIDE_PIXELS // PATCH_PIXELS) ** 2,
        vision_feature_layer=-1))  # LLaVA-1.5's -2 would leave one of two layers without use
    return model.to(torch.bfloat16)


def texts_of(rows: list[dict]) -> list[str]:
    """Questions and replies as the chat template writes them, each after a space."""
    parts = [part for row in rows for message in row["messages"] for part in message["content"]]
    words = [part["text"] for part in parts if part["type"] == "text"]
    return [f"USER: \n{text} ASSISTANT: {text}" for text in (*words, *LATER * len(words))]


def main(argv=None) -> None:
    """Write the folder init/ beside the data."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if not (folder / "train.parquet").is_file():
        raise StageError(f"{folder}/train.parquet: no such file",
                         f"python recipes/demo/data.py base {folder}")
    import pyarrow.parquet
    from transformers.utils import logging
    logging.disable_progress_bar()
    tokenizer = tokenizer_for(texts_of(pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()))
    model = model_for(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "init")
    processor_with(tokenizer).save_pretrained(folder / "init")
    terminal.say(f"{folder / 'init'}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    run_script(main)

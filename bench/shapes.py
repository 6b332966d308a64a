"""Checkpoints of bench sizes with random weights, and rows to train them on.

The processor and its small vocabulary are tests/zoo's; the sizes are these, and the embedding is as wide as a
real one. Weights and pictures are noise: what a step costs doesn't depend on them.
"""
import json
import random
from dataclasses import dataclass
from pathlib import Path

SYLLABLES = ("ka", "ro", "mi", "lus", "ten", "do", "vra", "esh", "un", "pil", "gor", "ay")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a vision-language model; heads are as wide in the tower as in the text."""
    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    patch: int
    pixels: int                            # edge of the largest picture

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    def text(self) -> dict:
        """The keys of a text configuration."""
        return dict(hidden_size=self.width, num_hidden_layers=self.layers, intermediate_size=self.mlp,
                    num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
                    vocab_size=self.vocabulary, max_position_embeddings=8192)


SIZES = {
    "70m": Sizes(512, 8, 1536, 8, 4, 32_768, 12, 256, 14, 336),
    "262k": Sizes(512, 8, 1536, 8, 4, 262_144, 12, 256, 14, 336),
    "tiny": Sizes(64, 2, 128, 4, 2, 512, 2, 32, 14, 56),
}


def qwen2_vl(sizes: Sizes):
    """Qwen2-VL: pictures of any size, four patches to a token; 144 tokens for 336 pixels squared."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    from tests.zoo import qwen
    from tests.zoo.checkpoint import Parts
    tokenizer = qwen.tokenizer_with(*qwen.MEDIA.values())
    tower = dict(depth=sizes.tower_layers, embed_dim=sizes.tower_width, hidden_size=sizes.width, mlp_ratio=4,
                 num_heads=sizes.tower_width // sizes.head_width, patch_size=sizes.patch)
    pairs = sizes.head_width // 2
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]      # as 16, 24, 24 of 64
    config = qwen.configure(Qwen2VLConfig, tokenizer, tower, sections, **sizes.text())
    pictures = dict(patch_size=sizes.patch,
                    size={"shortest_edge": (2 * sizes.patch) ** 2, "longest_edge": sizes.pixels ** 2})
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**pictures), tokenizer,
                                 Qwen2VLVideoProcessor(**pictures))
    return Parts(config, processor, qwen.STOP, "qwen2_vl")


def llava(sizes: Sizes):
    """LLaVA-1.5: every picture a square, a token for each patch; 576 tokens for 336 pixels squared."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from tests.zoo import llama
    from tests.zoo.checkpoint import decoder
    parts = llama.llava()
    tower = dict(hidden_size=sizes.tower_width, intermediate_size=4 * sizes.tower_width,
                 num_hidden_layers=sizes.tower_layers, image_size=sizes.pixels, patch_size=sizes.patch,
                 num_attention_heads=sizes.tower_width // sizes.head_width, projection_dim=sizes.width)
    parts.config = LlavaConfig(text_config=LlamaConfig(**decoder(parts.tokenizer, **sizes.text())),
                               vision_config=CLIPVisionConfig(**tower),
                               image_token_index=parts.config.image_token_id,
                               image_seq_length=(sizes.pixels // sizes.patch) ** 2)
    parts.processor.patch_size = sizes.patch
    parts.processor.image_processor.size = {"shortest_edge": sizes.pixels}
    parts.processor.image_processor.crop_size = {"height": sizes.pixels, "width": sizes.pixels}
    return parts


FAMILIES = {"qwen2_vl": qwen2_vl, "llava": llava}


def build(family: str, sizes: Sizes, folder: Path) -> Path:
    """The folder, with a bfloat16 checkpoint of that family and those sizes written in it."""
    from tests.zoo.checkpoint import write
    return write(FAMILIES[family](sizes), folder, seed=0, dtype="bfloat16")


# ---- rows ----

def write_rows(folder: Path, rows: int, pixels: int, mixed: bool, seed: int = 0) -> Path:
    """The path of rows.jsonl, written with its pictures.

    Alike: one picture of pixels x pixels, 16 characters asked, 48 answered. Mixed: pictures of a third of
    that edge up to all of it, none in one row of five, and answers of 10 to 400 characters, mostly short.
    """
    chance, made = random.Random(seed), []
    for _ in range(rows):
        edges = tuple(chance.randint(pixels // 3, pixels) if mixed else pixels for _ in range(2))
        letters = int(10 * 40 ** chance.random()) if mixed else 48
        made.append((16, letters, [] if mixed and chance.random() < 0.2 else [edges]))
    return write(folder, made, chance)


def write(folder: Path, rows: list[tuple[int, int, list[tuple[int, int]]]], chance: random.Random) -> Path:
    """The path of rows.jsonl: of each row, characters asked and answered, and the edges of its pictures."""
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, (asked, answered, pictures) in enumerate(rows):
            names = [f"{number:04}-{place}.png" for place in range(len(pictures))]
            for name, (width, height) in zip(names, pictures):
                noise = chance.randbytes(3 * width * height)
                Image.frombytes("RGB", (width, height), noise).save(folder / name)
            turns = [{"role": "user", "content": words(chance, asked)},
                     {"role": "assistant", "content": words(chance, answered)}]
            file.write(json.dumps({"messages": turns, "images": names}) + "\n")
    return folder / "rows.jsonl"


def words(chance: random.Random, letters: int) -> str:
    """A text of so many characters."""
    text = ""
    while len(text) < letters:
        text += " ".join("".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(8)) + " "
    return text[:letters].rstrip().ljust(letters, "x")

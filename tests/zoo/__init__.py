"""Tiny random checkpoints of every supported family, on disk as a user would have them.

    python -m tests.zoo qwen2_5_vl DIR          # or: from tests import zoo; zoo.build("qwen2_5_vl", folder)

A folder holds config.json, generation_config.json, model.safetensors, the tokenizer, processor_config.json
and chat_template.jinja. The classes, special tokens and turn formats are the family's own. Ours are the
vocabulary (bytes and a few merges), the sizes (64 wide, 2 to 4 layers, pictures of some 16 patches), the
weights (random, seeded) and the wording of the templates.
"""

import importlib
from pathlib import Path

VARIANTS = {
    "llama": ("llama_text", "llava", "mllama", "llama4"),
    "gemma": ("gemma3_text", "gemma3", "gemma3n", "gemma4_e2b", "gemma4_moe", "paligemma"),
    "qwen": ("qwen_text", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    "mistral": ("pixtral", "mistral3", "mistral4", "magistral", "voxtral"),
    "glm": ("glm4v", "glm46v", "glm4v_moe"),
    "others": ("smolvlm2", "lfm2_vl", "internvl", "paddleocr_vl", "minicpmv"),
}
NAMES = tuple(name for names in VARIANTS.values() for name in names)
TEXT_ONLY = ("llama_text", "gemma3_text", "qwen_text")
TEMPLATES = Path(__file__).parent / "templates"


def build(name: str, folder: str | Path, seed: int = 0, dtype: str = "float32") -> Path:
    """The folder, with the checkpoint of variant `name` written in it.

    The same name, seed and dtype give the same bytes. float32 is for exact comparisons: real checkpoints are
    bfloat16. A missing package that this family alone needs raises ImportError with the pip command.
    """
    # Here, since importing transformers takes seconds, and pytest's collection needs no more than NAMES.
    from tests.zoo.checkpoint import write

    module = next((module for module, names in VARIANTS.items() if name in names), None)
    if module is None:
        raise ValueError(f"no variant {name!r} in the zoo; it has {', '.join(NAMES)}")
    parts = getattr(importlib.import_module(f"tests.zoo.{module}"), name)()
    return write(parts, Path(folder), seed, dtype)

"""Writes a checkpoint folder from the parts that a family's builder gives."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, GenerationConfig

from tests.zoo import TEMPLATES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class Parts:
    """What a builder returns: the configuration, the processor, and what else the folder needs."""

    config: object
    processor: object  # in a text-only family the tokenizer
    stop: tuple[str, ...]  # the tokens that end generation
    template: str | None = None  # a file of templates/, without its ending
    tokenizer: object = None  # the processor's own, unless the processor has none
    tekken: str | None = None  # the text of tekken.json, which then is all there is of the tokenizer

    def __post_init__(self):
        if self.tokenizer is None:
            self.tokenizer = getattr(self.processor, "tokenizer", self.processor)


def decoder(tokenizer, **more) -> dict:
    """A text configuration: the sizes all families share, the tokenizer's facts, and `more` of the family."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=4096)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **sizes, **heads, **ids, **more}


def tower(**more) -> dict:
    """A vision or audio configuration under the names that most families use, and `more` of the family."""
    return dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2) | more


def require(package: str, needed_by: str, pip: str) -> None:
    """Raise an ImportError that says what to install, where the package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{needed_by} needs {package}: pip install {pip}")


def write(parts: Parts, folder: Path, seed: int, dtype: str) -> Path:
    """The folder, with model, tokenizer, processor and template saved in it."""
    folder.mkdir(parents=True, exist_ok=True)
    auto_class = AutoModelForCausalLM if parts.processor is parts.tokenizer else AutoModelForMultimodalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(parts.config, dtype=torch.float32)
        randomise(model)
    model.generation_config = GenerationConfig(
        bos_token_id=parts.tokenizer.bos_token_id,
        eos_token_id=parts.tokenizer.convert_tokens_to_ids(list(parts.stop)),
        pad_token_id=parts.tokenizer.pad_token_id,
    )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # model.to(dtype) would also cast Llama-4's complex rotary table
            tensor.data = tensor.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if parts.template:
        template = (TEMPLATES / f"{parts.template}.jinja").read_text(encoding="utf-8")
        parts.processor.chat_template = parts.tokenizer.chat_template = template
    parts.processor.save_pretrained(folder)
    if parts.tekken:
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / "tekken.json").write_text(parts.tekken, encoding="utf-8")
    return folder


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter a value that shows in the logits.

    The families' own initialisation (std 0.02, zeros for gates and for some projectors) makes a narrow model
    deaf: pictures would not reach the logits. Here an output has about the variance of its inputs.
    """
    for module in model.modules():
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                inputs = parameter[0].numel() if convolution else parameter.shape[-1]
                parameter.normal_(std=inputs**-0.5)
            elif parameter.numel() == 1:  # a gate, closed by default
                parameter.fill_(0.5)
            else:  # norms, biases, scales
                parameter.add_(0.1 * torch.randn_like(parameter))

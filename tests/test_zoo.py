"""The zoo's checkpoints load and answer as real ones do, so that the other tests may stand on them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads on two busy cores are slower than one

import functools
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from lib import text
from tests import zoo

SEES = [name for name in zoo.NAMES if name not in (*zoo.TEXT_ONLY, "voxtral")]
HEARS = ["gemma3n", "gemma4_e2b"]  # and voxtral, whose pictures are sounds below
WATCHES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v"]
WATCHES += ["glm4v_moe", "smolvlm2", "gemma4_e2b", "gemma4_moe", "internvl"]
OPTIONAL = {"gemma3n": ["timm"], "smolvlm2": ["num2words"], "voxtral": ["mistral_common", "soundfile"]}

# What serves where a folder has no template, as the published one.
OWN_TEMPLATE = {"magistral": zoo.TEMPLATES / "mistral_v7.jinja",
                "paligemma": Path(text.__file__).with_name("templates") / "paligemma.jinja"}


class Loaded:
    """A variant as a user gets it, loaded by the auto classes."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        text_only = name in zoo.TEXT_ONLY
        self.processor = (AutoTokenizer if text_only else AutoProcessor).from_pretrained(folder)
        auto_class = AutoModelForCausalLM if text_only else AutoModelForMultimodalLM
        self.model = auto_class.from_pretrained(folder).eval()
        if name in OWN_TEMPLATE:
            self.processor.chat_template = OWN_TEMPLATE[name].read_text("utf-8")

    def encode(self, *media: dict) -> dict:
        """The batch of one conversation: a question after the media."""
        content = [*media, {"type": "text", "text": "What is\nin this one?"}]
        if self.name in zoo.TEXT_ONLY:
            content = content[-1]["text"]
        keys = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        if self.name == "voxtral":  # always does, and refuses to be told
            keys = {}
        return self.cast(self.processor.apply_chat_template([{"role": "user", "content": content}], **keys))

    def cast(self, batch) -> dict:
        """The batch in the model's dtype: Llama-4's processor gives bfloat16 pixels to any model."""
        dtype = self.model.dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    @torch.inference_mode()
    def logits(self, batch: dict) -> torch.Tensor:
        """The logits [1, T, V]."""
        return self.model(**batch).logits


@pytest.fixture(scope="module", name="load")
def loader(zoo):
    """A function that loads a variant, once for the module."""
    @functools.cache
    def load(name: str) -> Loaded:
        for package in OPTIONAL.get(name, ()):
            pytest.importorskip(package)
        return Loaded(name, zoo(name))

    return load


def picture(seed: int) -> dict:
    """A message part with a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def sound(seed: int, folder: Path) -> dict:
    """A message part with a second of noise, in a wav file."""
    path = folder / f"{seed}.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 16000, "NONE", ""))
        file.writeframes(np.random.default_rng(seed).integers(-9000, 9000, 16000, dtype=np.int16).tobytes())
    return {"type": "audio", "path": str(path)}


def medium(name: str, seed: int, folder: Path) -> dict:
    """A message part with the medium that the variant was made for."""
    return sound(seed, folder) if name == "voxtral" else picture(seed)


@pytest.mark.parametrize("name", zoo.TEXT_ONLY)
def test_logits_of_a_text_differ_between_tokens(name, load):
    assert load(name).logits(load(name).encode()).std() > 0.1


@pytest.mark.parametrize("name", [*SEES, "voxtral"])
def test_other_pixels_give_other_logits_where_the_answer_begins(name, load, tmp_path):
    logits = [load(name).logits(load(name).encode(medium(name, seed, tmp_path)))[0, -1] for seed in (0, 1)]
    assert (logits[0] - logits[1]).abs().max() > 0.01


def prompt(processor, kind: str) -> str:
    """The rendered question about one medium of a kind."""
    content = [{"type": kind}, {"type": "text", "text": "What?"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("name", HEARS)
def test_other_sounds_give_other_logits(name, load):
    variant, logits = load(name), []
    for seed in (0, 1):
        samples = np.random.default_rng(seed).normal(size=16000).astype(np.float32)
        batch = variant.processor(
            text=[prompt(variant.processor, "audio")], audio=[samples], return_tensors="pt"
        )
        logits.append(variant.logits(variant.cast(batch))[0, -1])
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", WATCHES)
def test_other_frames_give_other_logits(name, load):
    variant, logits = load(name), []
    metadata = [VideoMetadata(total_num_frames=4, fps=2.0, duration=2.0, frames_indices=[0, 1, 2, 3])]
    keys = dict(video_metadata=metadata, do_sample_frames=False, return_tensors="pt")
    for seed in (0, 1):
        frames = np.random.default_rng(seed).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
        batch = variant.processor(text=[prompt(variant.processor, "video")], videos=[frames], **keys)
        logits.append(variant.logits(variant.cast(batch))[0, -1])
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_folder_holds_what_a_published_one_does(name, load):
    files = {path.name for path in load(name).folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    if name in ("magistral", "voxtral"):
        expected |= {"tekken.json"}
    else:
        expected |= {"tokenizer.json", "tokenizer_config.json"}
        expected |= {"chat_template.jinja"} if name != "paligemma" else set()
    if name not in zoo.TEXT_ONLY:
        expected |= {"preprocessor_config.json" if name == "voxtral" else "processor_config.json"}
    assert files == expected


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "magistral"])       # a vocabulary of each kind
def test_the_same_seed_gives_the_same_bytes(name, load, tmp_path):
    again = zoo.build(name, tmp_path)
    for path in load(name).folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_another_seed_and_type_give_other_weights(load, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(zoo.build("llava", tmp_path, seed=1, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert not torch.allclose(model.lm_head.weight.float(), load("llava").model.lm_head.weight, atol=0.1)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no variant 'lava'.*llava"):
        zoo.build("lava", tmp_path)

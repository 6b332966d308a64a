"""A budget of pixels bounds what each family's own processor makes of a picture, and is saved with it."""

import functools
import json

import pytest
from PIL import Image

from lib import registry
from lib.media import pictures
from lib.media.budget import largest_budget, set_token_budget
from lib.media.media import Decoding, decode, read_medium
from lib.media.resolution import bounds_of, set_budget, with_bounds
from lib.models import families
from lib.run.errors import StageError
from lib.text.processor import load_processor

LARGE = Image.new("RGB", (400, 400), "red")
TYPES = {"smolvlm2": "smolvlm", "pixtral": "llava", "gemma4_e2b": "gemma4", "minicpmv": "minicpmv4_6"}
# variant: (a budget of pixels, tokens of a large picture without it, tokens with it), those around it included
BOUNDED = {
    "qwen2_5_vl": (1024, 16, 4), "paddleocr_vl": (1024, 16, 4), "glm46v": (1024, 16, 4),
    "mistral3": (32 * 32, 16 + 4, 4 + 2), "gemma4_e2b": (140 * 12**2, 64 + 2, 121 + 2), "llama4": (2 * 32**2, 27, 7),
    "internvl": (32 * 32, 5 * 4 + 2, 4 + 2), "smolvlm2": (32 * 32, 33, 7), "lfm2_vl": (32 * 32, 27, 6),
}
FIXED = ("llava", "gemma3", "gemma3n", "mllama")


@pytest.fixture(scope="module")
def processor_of(zoo):
    """A function: variant -> (a freshly loaded processor, its family)."""
    def processor_of(name: str):
        return load_processor(zoo(name)), registry.family_of(TYPES.get(name, name))
    return processor_of


def tokens(processor) -> int:
    """How many tokens the large picture becomes, with those around it."""
    made = processor(text=[processor.image_token], images=[LARGE], add_special_tokens=False)
    return len(made["input_ids"][0])


@pytest.mark.parametrize("name", BOUNDED)
def test_a_budget_bounds_the_tokens_of_a_large_picture_and_is_saved(name, processor_of, tmp_path):
    budget, free, bounded = BOUNDED[name]
    processor, family = processor_of(name)
    before = tokens(processor)
    set_budget(processor, family, None, budget)
    processor.save_pretrained(tmp_path)
    assert (before, tokens(processor), tokens(load_processor(tmp_path))) == (free, bounded, bounded)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm46v", "paddleocr_vl"])
def test_a_lower_bound_enlarges_small_pictures(name, processor_of):
    processor, family = processor_of(name)
    set_budget(processor, family, 2048, 2048)
    small = Image.new("RGB", (16, 16))
    made = processor(text=[processor.image_token], images=[small])
    assert made["image_grid_thw"][0].prod() * 8**2 >= 1024


@pytest.mark.parametrize("name", FIXED)
def test_a_family_with_pictures_of_one_size_refuses_a_budget_by_name(name, processor_of):
    processor, family = processor_of(name)
    with pytest.raises(StageError) as caught:
        set_budget(processor, family, None, 4096)
    assert caught.value.what == f"image_max_pixels: {family.name} makes every picture of one size"


@pytest.mark.parametrize("knob", ["image_max_pixels", "max_image_tokens"])
def test_pictures_that_no_setting_bounds_are_said_to_be_so(knob, processor_of):
    processor, family = processor_of("minicpmv")
    with pytest.raises(StageError, match=f"{knob}: MiniCPM-V sizes pictures by their shape, and no setting"):
        set_budget(processor, family, None, 4096) if knob == "image_max_pixels" else set_token_budget(processor, family, 64)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name not in ("qwen2_5_vl", "paddleocr_vl", "glm46v")])
def test_a_family_without_a_lower_bound_refuses_one_by_name(name, processor_of):
    processor, family = processor_of(name)
    with pytest.raises(StageError, match=f"image_min_pixels: {family.name} has no lower bound"):
        set_budget(processor, family, 100, None)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_budget_that_no_picture_keeps_is_refused_with_the_least_that_is_kept(name, processor_of):
    processor, family = processor_of(name)
    with pytest.raises(StageError, match="makes no picture of fewer than") as caught:
        set_budget(processor, family, None, 9)
    set_budget(processor, family, None, int(caught.value.fix.partition(": ")[2]))


TOKENS = {"qwen2_5_vl": 9, "paddleocr_vl": 9, "glm46v": 9, "mistral3": 12, "gemma4_e2b": 72, "llama4": 20, "internvl": 14,
          "smolvlm2": 10, "lfm2_vl": 20}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_budget_of_tokens_bounds_pictures_of_every_shape_and_is_nearly_reached(name, processor_of, tmp_path):
    processor, family = processor_of(name)
    set_token_budget(processor, family, TOKENS[name])
    processor.save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    shapes = [(400, 400), (800, 100), (90, 700), (400, 200), (30, 30)]
    shapes = shapes[:1] if name == "lfm2_vl" else shapes             # its own refuses very wide ones
    made = [len(processor(text=[processor.image_token], images=[Image.new("RGB", shape)], add_special_tokens=False)
                ["input_ids"][0]) for shape in shapes]
    assert TOKENS[name] / 2 < max(made) <= TOKENS[name]
    with pytest.raises(StageError, match="max_image_tokens: 1: base_model's processor makes no fewer than") as caught:
        set_token_budget(processor_of(name)[0], family, 1)
    set_token_budget(processor_of(name)[0], family, int(caught.value.fix.partition(": ")[2]))


@pytest.mark.parametrize("name", FIXED)
def test_a_family_with_pictures_of_one_size_refuses_a_budget_of_tokens_by_name(name, processor_of):
    processor, family = processor_of(name)
    with pytest.raises(StageError) as caught:
        set_token_budget(processor, family, 64)
    assert (caught.value.what, caught.value.fix) == (f"max_image_tokens: {family.name} makes every picture of one size",
                                                     "remove max_image_tokens")


@pytest.mark.parametrize("name", BOUNDED)
def test_the_pictures_of_one_row_are_shrunk_and_no_others(name, processor_of):
    processor, family = processor_of(name)
    free, wanted = BOUNDED[name][1:]
    most = largest_budget(processor, family.pixels, lambda bounded, _: tokens(bounded) <= wanted)
    bounds = json.loads(json.dumps(bounds_of(processor, family.pixels, most)))
    assert tokens(with_bounds(processor, bounds)) == wanted and tokens(processor) == free


def test_every_strategy_of_the_families_is_written():
    from lib.media.resolution import STRATEGIES
    named = {family.pixels for family in families.FAMILIES} - {""}
    assert named == set(STRATEGIES)


# ---- image_size ----


@pytest.mark.parametrize("size, box", [((40, 40), (0, 10, 40, 30)), ((80, 20), (20, 0, 60, 20))])
def test_image_size_fits_the_whole_picture_undistorted_into_black(size, box):
    image = pictures.fitted(Image.new("RGB", (80, 40), "red"), size, "bilinear")
    assert image.size == size and image.convert("L").point(lambda value: 255 * (value > 0)).getbbox() == box


@functools.cache
def png() -> bytes:
    import io
    buffer = io.BytesIO()
    Image.new("RGB", (64, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("algorithm", ["bilinear", "bicubic", "lanczos"])
def test_every_picture_of_a_row_is_resized_wherever_it_stands(algorithm, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    decoding = Decoding(image_width=33, image_height=21, image_resize_algorithm=algorithm)
    for source in ("a.png", {"bytes": png()}, Image.open(tmp_path / "a.png")):
        record, image = read_medium(source, tmp_path, decoding=decoding)
        assert image.size == (record["width"], record["height"]) == (33, 21)
    assert decode(png(), "a.png").size == (64, 20)

"""budget: the largest pictures that keep to a number of tokens, for all rows or for one.

A budget is a number of pixels. It is found by trying the processor itself, which alone knows how many tokens
it makes of a picture.

Fork me to: spend a row's tokens in another way (`largest_budget`).
"""
import contextlib
import math
from collections.abc import Callable

from PIL import Image

from lib.media.resolution import TooFew, bounds_of, refuse_unbounded, with_bounds
from lib.models.families import Family
from lib.run import terminal
from lib.run.errors import StageError

MOST_PIXELS = 2**24                       # the largest budget that is tried
SHAPES = (1, 2, 3, 4, 5, 6, 8, 10, 12)    # of pictures tried: width over height, and height over width


def set_token_budget(processor, family: Family, most_tokens: int | None) -> None:
    """Bound pictures so that none becomes more tokens, those that the processor puts around it included.

    Raises StageError where even the smallest picture takes more.
    """
    if most_tokens is None:
        return
    refuse_unbounded(processor, family, "max_image_tokens")

    def fits(bounded, pixels: int) -> bool:
        return most_tokens_of(bounded, pixels) <= most_tokens

    pixels = largest_budget(processor, family.pixels, fits)
    if pixels is None:
        fewest = fewest_pixels(processor, family.pixels)
        least = most_tokens_of(with_bounds(processor, bounds_of(processor, family.pixels, fewest)), fewest)
        raise StageError(f"max_image_tokens: {most_tokens}: base_model's processor makes no fewer than "
                         f"{least}", f"max_image_tokens: {least}")
    if pixels < MOST_PIXELS // 2:                                # else it bounds nothing
        for name, value in bounds_of(processor, family.pixels, pixels).items():
            setattr(processor.image_processor, name, value)
    terminal.say(f"max_image_tokens: {most_tokens} means pictures of at most {pixels:,} pixels")


def most_tokens_of(processor, pixels: int) -> int:
    """The most tokens that a processor with this budget of pixels makes of a picture of a usual shape."""
    lengths = []
    for wide in (*SHAPES, *(1 / high for high in SHAPES[1:])):
        size = math.ceil(math.sqrt(1.2 * pixels * wide)), math.ceil(math.sqrt(1.2 * pixels / wide))
        with contextlib.suppress(ValueError, RuntimeError):      # some refuse what is so wide
            made = processor(text=[processor.image_token], images=[Image.new("RGB", size)],
                             add_special_tokens=False)
            lengths.append(len(made["input_ids"][0]))
    return max(lengths)


def largest_budget(processor, pixels: str, fits: Callable) -> int | None:
    """The largest budget for which `fits(processor with it, budget)`, to 1 in 4,096; None: none fits."""
    def tried(most: int) -> bool:
        return fits(with_bounds(processor, bounds_of(processor, pixels, most)), most)

    fewest, most = fewest_pixels(processor, pixels), MOST_PIXELS
    if not tried(fewest):
        return None
    while most - fewest > max(1, fewest // 4096):
        middle = (fewest + most) // 2 if most < 2 * fewest else math.isqrt(fewest * most)
        fewest, most = (middle, most) if tried(middle) else (fewest, middle)
    return fewest


def fewest_pixels(processor, pixels: str) -> int:
    """The smallest budget of pixels that a processor can keep to."""
    try:
        bounds_of(processor, pixels, 1)
    except TooFew as error:
        return error.fewest
    return 1

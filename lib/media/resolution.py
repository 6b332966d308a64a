"""resolution: a budget of pixels for each picture, set in the family's own image processor and saved with it.

So training, evaluation and serving see a picture alike. Each strategy is one way in which processors bound
their pictures; a family's record names its own. A budget is never exceeded: one that can't be is refused.

Fork me to: bound another processor (a row in STRATEGIES, its name in the family's record).
"""
import copy
import math

from lib.models.families import Family
from lib.run.errors import StageError


class TooFew(StageError):
    """A budget below `fewest`, the pixels of the smallest picture that a processor makes."""

    def __init__(self, most: int, fewest: int):
        super().__init__(f"image_max_pixels: {most:,}: base_model's processor makes no picture of fewer than "
                         f"{fewest:,} pixels", f"image_max_pixels: {fewest}")
        self.fewest = fewest


def refuse_unbounded(processor, family: Family, knob: str) -> None:
    """Raise StageError where no budget can be set in this processor."""
    if not has_bounds(processor, family.pixels):
        raise StageError(f"{knob}: {family.name} {family.unbounded}", f"remove {knob}")


def has_bounds(processor, pixels: str) -> bool:
    """Whether a budget can be set, by a strategy's name."""
    images = getattr(processor, "image_processor", None)
    return images is not None and pixels in STRATEGIES and (pixels != "edge" or bool(edge_of(images)))


def set_budget(processor, family: Family, least: int | None, most: int | None) -> None:
    """Make the processor size pictures to `least` to `most` pixels (None: as the checkpoint has it)."""
    if least is None and most is None:
        return
    refuse_unbounded(processor, family, "image_min_pixels" if most is None else "image_max_pixels")
    images = processor.image_processor
    strategy, bounded_below = STRATEGIES[family.pixels]
    if least is not None and not bounded_below:
        raise StageError(f"image_min_pixels: {family.name} has no lower bound for its pictures",
                         "remove image_min_pixels")
    strategy(images, least, most)


def bounds_of(processor, pixels: str, most: int) -> dict:
    """{attribute of the image processor: value} that a budget of `most` pixels sets; pixels: the strategy."""
    images = copy.deepcopy(processor.image_processor)
    STRATEGIES[pixels][0](images, None, most)
    before = vars(processor.image_processor)
    return {name: value for name, value in vars(images).items() if value != before.get(name)}


def with_bounds(processor, bounds: dict):
    """A copy of a processor whose image processor has these attributes."""
    processor = copy.copy(processor)
    processor.image_processor = copy.deepcopy(processor.image_processor)
    for name, value in bounds.items():
        setattr(processor.image_processor, name, value)
    return processor


# ---- strategies ------------------------------------------------------------------------------------------


def area(images, least: int | None, most: int | None, frames: int = 1) -> None:
    """Bound pictures by `size`, whose "edges" are, despite their names, numbers of pixels.

    frames: how often each picture counts.
    """
    bounds = dict(images.size) if isinstance(images.size, dict) else vars(images.size)
    cell = (images.patch_size * images.merge_size) ** 2
    if most is not None and most < cell:
        raise TooFew(most, cell)
    most = bounds["longest_edge"] if most is None else most * frames
    least = min(bounds["shortest_edge"], most) if least is None else least * frames
    images.size = {"shortest_edge": least, "longest_edge": most}


def area_of_two(images, least: int | None, most: int | None) -> None:
    """Bound pictures by `size` in pixels, where a picture counts twice, as two frames of a clip."""
    area(images, least, most, frames=2)


def edge(images, least: None, most: int) -> None:
    """Bound pictures by `longest_edge`, the longer side: set to the side of a square of `most` pixels."""
    patch = images.patch_size["height"] if isinstance(images.patch_size, dict) else images.patch_size
    if most < (4 * patch) ** 2:
        raise TooFew(most, (4 * patch) ** 2)
    images.size = {"longest_edge": min(math.isqrt(most), edge_of(images))}


def edge_of_tiles(images, least: None, most: int) -> None:
    """Bound pictures by `longest_edge`, a multiple of a tile's side, to which every picture is enlarged."""
    tile = images.max_image_size["longest_edge"]
    if most < tile**2:
        raise TooFew(most, tile**2)
    images.size = {"longest_edge": min(math.isqrt(most) // tile * tile, edge_of(images))}


def tiles(images, least: None, most: int) -> None:
    """Bound pictures by `max_patches`, the number of tiles of the size that the tower takes."""
    tile = images.size["height"] * images.size["width"]
    if most < tile:
        raise TooFew(most, tile)
    images.max_patches = min(most // tile, images.max_patches)


def tiles_or_tokens(images, least: None, most: int) -> None:
    """Bound pictures by `max_tiles`, and untiled ones by tokens, each of which is a square of pixels."""
    token = (images.encoder_patch_size * images.downsample_factor) ** 2
    if most < token * images.min_image_tokens:
        raise TooFew(most, token * images.min_image_tokens)
    images.max_image_tokens = min(most // token, images.max_image_tokens)
    images.max_tiles = min(most // images.tile_size**2, images.max_tiles)
    if images.max_tiles < images.min_tiles:
        images.do_image_splitting = False


def levels(images, least: None, most: int) -> None:
    """Bound pictures by `max_soft_tokens`, which has five levels; each token is a square of pixels."""
    token = (images.patch_size * images.pooling_kernel_size) ** 2
    fitting = [level for level in (70, 140, 280, 560, 1120) if level * token <= most]
    if not fitting:
        raise TooFew(most, 70 * token)
    images.max_soft_tokens = fitting[-1]


STRATEGIES = {"area": (area, True), "area_of_two": (area_of_two, True), "edge": (edge, False),
              "edge_of_tiles": (edge_of_tiles, False), "tiles": (tiles, False),
              "tiles_or_tokens": (tiles_or_tokens, False), "levels": (levels, False)}


def edge_of(images) -> int | None:
    """The longest edge in an image processor's size; None where it has no such bound."""
    size = images.size
    return size.get("longest_edge") if isinstance(size, dict) else getattr(size, "longest_edge", None)

"""pictures: a decoded picture of any mode as RGB, as a person sees it."""
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: greys of over 8 bits are scaled, not clipped; transparency is white."""
    if image.mode.startswith(("I", "F")):
        grey = image.convert("F")
        scale = 255 / white_of(image.mode, grey.getextrema()[1])
        return grey.point(lambda value: value * scale + 0).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def white_of(mode: str, brightest: float) -> float:
    """The value that means white in a grey picture of over 8 bits: its mode's, or the usual one that fits."""
    if mode.startswith("I;16"):
        return 65535
    usual = (1, 255, 65535) if mode == "F" else (255, 65535)
    return next((white for white in usual if brightest <= white), brightest)


def fitted(image: Image.Image, size: tuple[int, int], algorithm: str) -> Image.Image:
    """The whole picture, undistorted and as large as fits into (width, height), centred on black."""
    return ImageOps.pad(image, size, method=Image.Resampling[algorithm.upper()], color="black")

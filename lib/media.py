"""media: pictures from anything that a row holds, as the RGB image that the processor will see.

Every decode in the kit goes through `decode`: in 02, where a bad picture is found, and in 05's workers and in
06, where none can be bad any more.

Fork me to: change what a picture becomes (`to_rgb`), or where it comes from (`locate`).
"""
import base64
import hashlib
import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000       # 360 MB decoded; anything above is a mistake or a bomb
Image.MAX_IMAGE_PIXELS = None  # PIL only warns, up to twice its own limit; ours is checked before decoding


class MediaError(ValueError):
    """A medium that can't be used: MediaError(path or name, why)."""

    def __init__(self, name: Path | str, why: str):
        super().__init__(f"{name}: {why}")
        self.name = name


def read_medium(source, root: Path) -> tuple[dict, Image.Image]:
    """(media record, RGB image) of a path, bytes, a data uri, {path, bytes} or a PIL image.

    The record is {kind, path, bytes, sha256, width, height, seconds}. Paths are relative to `root` and stay
    paths in it; bytes are kept in it. MediaError if there is no picture to be had.
    """
    path, data = locate(source, root)
    raw = data if data is not None else read_file(path)
    image = decode(raw, path or "picture in the row")
    record = {"kind": "image", "path": str(path) if data is None else None, "bytes": data,
              "sha256": hashlib.sha256(raw).hexdigest(),
              "width": image.width, "height": image.height, "seconds": None}
    return record, image


def open_image(record: dict) -> Image.Image:
    """The RGB image [width x height] of a sample's media record."""
    path, data = record["path"], record["bytes"]
    return decode(data if data is not None else read_file(Path(path)), path or record["sha256"])


def locate(source, root: Path) -> tuple[Path | None, bytes | None]:
    """(path, None) for a file, (None, bytes) for anything that is only in the row."""
    if isinstance(source, dict):
        keys = ("bytes", "path", "image", "url", "base64")
        source = next((source[key] for key in keys if source.get(key) is not None), None)
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return None, buffer.getvalue()
    if isinstance(source, (bytes, bytearray)):
        return None, bytes(source)
    if not isinstance(source, (str, Path)) or not str(source):
        raise MediaError("picture", f"must be a path, bytes or an image, not {source!r:.40}")
    text = str(source)
    if text.startswith("data:"):
        return None, from_base64(text)
    if text.startswith(("http://", "https://")):
        raise MediaError(f"{text:.80}", "pictures behind urls are not fetched; download it and give the path")
    return root / text, None


def from_base64(uri: str) -> bytes:
    """The bytes of a data uri, or a MediaError."""
    try:
        return base64.b64decode("".join(uri.partition(",")[2].split()), validate=True)
    except ValueError as error:
        raise MediaError(f"{uri:.40}", f"broken base64 ({error})") from None


def read_file(path: Path) -> bytes:
    """A file's bytes, or a MediaError that names it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except (OSError, ValueError) as error:              # ValueError: a name with a zero byte
        raise MediaError(f"{str(path)!r:.200}", getattr(error, "strerror", None) or str(error)) from None


def decode(raw: bytes, name) -> Image.Image:
    """The first frame as an upright RGB image, transparency on white; a MediaError if that can't be had."""
    if not raw:
        raise MediaError(name, "empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height <= MAX_PIXELS:
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise MediaError(name, f"not a picture (it starts with {raw[:12]!r})") from None
    except Exception as error:  # decoders raise whatever they like: one of the kit's three boundaries
        raise MediaError(name, f"not a readable picture ({error or type(error).__name__})") from None
    raise MediaError(name, f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: deep greys are scaled (a plain convert clips them), transparency lies on white."""
    if image.mode.startswith(("I", "F")):
        grey = image.convert("F")
        scale = 255 / white_of(image.mode, grey.getextrema()[1])
        return grey.point(lambda value: value * scale + 0).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def white_of(mode: str, brightest: float) -> float:
    """The value that means white in a grey picture of over 8 bits: its type's, or the usual one that fits."""
    if mode.startswith("I;16"):
        return 65535
    usual = (1, 255, 65535) if mode == "F" else (255, 65535)
    return next((white for white in usual if brightest <= white), brightest)

"""media: pictures from any file that a data set holds, as the RGB image that the processor will see.

Every decode in the kit goes through `open_image`, in 02 (where a bad picture is found) and in 05's workers and 06 (where
it can't fail any more).
"""
import base64
import hashlib
import io
from pathlib import Path

from PIL import Image, ImageOps

MAX_PIXELS = 120_000_000      # a 120-megapixel picture is 360 MB decoded; anything above is a mistake or a bomb
Image.MAX_IMAGE_PIXELS = None  # PIL would only warn up to twice its own limit: ours is checked before decoding


class MediaError(ValueError):
    """A medium that can't be used; the message names it and says why."""


def read_medium(source, root: Path) -> dict:
    """{kind, path, bytes, sha256, width, height, seconds} of a picture given as path, bytes, {path, bytes} or PIL image.

    Paths are relative to `root` and stay paths in the sample; bytes are kept in it. The picture is decoded once, here.
    """
    path, data = locate(source, root)
    raw = data if data is not None else read_file(path)
    if not raw:
        raise MediaError(f"{path or 'picture'}: empty file (0 bytes)")
    image = decode(raw, path or "picture")
    return {"kind": "image", "path": str(path) if data is None else None, "bytes": data,
            "sha256": hashlib.sha256(raw).hexdigest(), "width": image.width, "height": image.height, "seconds": None}


def locate(source, root: Path) -> tuple[Path | None, bytes | None]:
    """(path, None) for a file, (None, bytes) for anything that is only in the row."""
    if isinstance(source, dict):
        if source.get("bytes"):
            return None, bytes(source["bytes"])
        source = source.get("path") or source.get("image") or source.get("base64")
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return None, buffer.getvalue()
    if isinstance(source, (bytes, bytearray)):
        return None, bytes(source)
    if not isinstance(source, (str, Path)) or not str(source):
        raise MediaError(f"a picture must be a path, bytes or an image, not {type(source).__name__}")
    text = str(source)
    if text.startswith("data:"):
        return None, from_base64(text.partition(",")[2])
    if text.startswith(("http://", "https://")):
        raise MediaError(f"{text[:80]}: pictures behind urls are not fetched; download them and give the path")
    return root / text, None


def from_base64(text: str) -> bytes:
    """The decoded bytes, or a MediaError."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MediaError(f"broken base64 ({error}): {text[:40]}…") from None


def read_file(path: Path) -> bytes:
    """A file's bytes, or a MediaError that names it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from None


def decode(raw: bytes, name) -> Image.Image:
    """The first frame as an upright RGB image, transparency on white. A MediaError names what can't be decoded."""
    try:
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(f"{name}: {image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}")
        image.load()
    except MediaError:
        raise
    except Exception as error:  # decoders raise whatever they like: one of the kit's three boundaries
        raise MediaError(f"{name}: not a readable picture ({error})") from None
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit greys are scaled (a plain convert clips them to white), transparency lies on white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        grey = image.convert("F")
        _, high = grey.getextrema()
        scale = 65535.0 if image.mode.startswith("I") and high > 255 else max(high, 255.0)
        return grey.point(lambda value: value * (255.0 / scale)).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def open_image(medium: dict) -> Image.Image:
    """The RGB image [width x height] of a sample's media record."""
    path = medium["path"]
    return decode(medium["bytes"] if medium["bytes"] is not None else read_file(Path(path)), path or medium["sha256"])

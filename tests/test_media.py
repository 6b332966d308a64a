"""Every picture comes out as the upright RGB image that a person sees, or as an error that names it."""

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import media
from lib.media import MediaError, open_image, read_medium

RED, GREEN, WHITE, BLACK, GREY = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0), (128, 128, 128)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    """The first row of a decoded picture."""
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def half_clear() -> Image.Image:
    """Two pixels: red, and black that nobody sees."""
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*BLACK, 0))
    return image


def rotated() -> bytes:
    """A picture of 3 x 1 pixels as a camera that was held sideways stores it: red comes to lie at the top."""
    image, exif = Image.new("RGB", (3, 1), GREEN), Image.Exif()
    image.putpixel((0, 0), RED)
    exif[0x0112] = 6  # turn by 90 degrees to the right
    return encoded(image, exif=exif)


def palette_with_clear_colour() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLACK])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=1)


def animation() -> bytes:
    frames = [Image.new("RGB", (1, 1), colour) for colour in (RED, GREEN)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def deep(values, dtype, kind="PNG") -> bytes:
    """A grey picture with these values in its only row."""
    return encoded(Image.fromarray(np.array([values], dtype=dtype)), kind)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size, with next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


PICTURES = {
    "greyscale": (lambda: encoded(Image.new("L", (1, 1), 128)), [GREY]),
    "black and white": (lambda: encoded(Image.new("1", (1, 1), 1)), [WHITE]),
    "a palette": (lambda: encoded(Image.new("RGB", (1, 1), RED).convert("P")), [RED]),
    "a palette with a clear colour, on white": (palette_with_clear_colour, [RED, WHITE]),
    "RGBA on white": (lambda: encoded(half_clear()), [RED, WHITE]),
    "grey with alpha, on white": (lambda: encoded(half_clear().convert("LA")), [(76, 76, 76), WHITE]),
    "RGBA in a WebP": (lambda: encoded(half_clear(), "WEBP", lossless=True), [RED, WHITE]),
    "CMYK": (lambda: encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
    "an animation's first frame": (animation, [RED]),
    "1x1": (lambda: encoded(Image.new("RGB", (1, 1), GREEN)), [GREEN]),
    "16-bit grey": (lambda: deep([0, 32896, 65535], "uint16"), [BLACK, GREY, WHITE]),
    "a dark one of 16 bits stays dark": (lambda: deep([0, 200], "uint16"), [BLACK, BLACK]),
    "32 bits with values of 16": (lambda: deep([0, 32896, 65535], "int32", "TIFF"), [BLACK, GREY, WHITE]),
    "32 bits with values of 8": (lambda: deep([0, 128, 255], "int32", "TIFF"), [BLACK, GREY, WHITE]),
    "floats from 0 to 1": (lambda: deep([0, 0.5025, 1], "float32", "TIFF"), [BLACK, GREY, WHITE]),
    "floats below zero are black": (lambda: deep([-3, 1], "float32", "TIFF"), [BLACK, WHITE]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_kind_comes_out_as_a_person_sees_it(name):
    make, expected = PICTURES[name]
    assert pixels(media.decode(make(), name)) == expected


def test_a_picture_that_was_taken_sideways_stands_upright():
    record, image = read_medium(rotated(), Path())
    assert (image.width, image.height) == (record["width"], record["height"]) == (1, 3)
    assert [image.getpixel((0, y)) for y in range(3)] == [RED, GREEN, GREEN]


def test_a_jpeg_keeps_its_colours_nearly():
    (found,) = pixels(media.decode(encoded(Image.new("RGB", (1, 1), RED), "JPEG"), "a"))
    assert max(abs(a - b) for a, b in zip(found, RED)) <= 2


PNG = encoded(Image.new("RGB", (1, 1), RED))


@pytest.mark.parametrize("source", [
    "a.png", Path("a.png"), {"path": "a.png"}, {"path": "a.png", "bytes": None}, {"image": "a.png"},
], ids=str)
def test_a_picture_by_path_is_found_beside_the_data_file_and_stays_a_path(source, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    record, image = read_medium(source, tmp_path)
    assert record == {"kind": "image", "path": str(tmp_path / "a.png"), "bytes": None,
                      "sha256": hashlib.sha256(PNG).hexdigest(), "width": 1, "height": 1, "seconds": None}
    assert pixels(image) == pixels(open_image(record)) == [RED]


@pytest.mark.parametrize("source", [
    PNG, bytearray(PNG), {"bytes": PNG, "path": None}, {"bytes": PNG, "path": "elsewhere.png"},
    Image.new("RGB", (1, 1), RED), "data:image/png;base64," + base64.b64encode(PNG).decode(),
    "data:;base64," + base64.encodebytes(PNG).decode(),
], ids=lambda source: type(source).__name__)
def test_a_picture_in_the_row_is_kept_as_bytes(source, tmp_path):
    record, image = read_medium(source, tmp_path)
    assert record["path"] is None and record["sha256"] == hashlib.sha256(record["bytes"]).hexdigest()
    assert pixels(image) == pixels(open_image(record)) == [RED]


BAD = {  # what a row gives: what is said
    "a.png": "a.png: no such file",
    "folder": "'folder': Is a directory",
    "empty.png": "empty.png: empty file (0 bytes)",
    "text.png": "text.png: not a picture (it starts with b'<!DOCTYPE ht')",
    "cut.png": "cut.png: not a readable picture (image file is truncated)",
    "cut.jpg": "cut.jpg: not a readable picture (image file is truncated (…",
    "bomb.png": "bomb.png: 50000x50000 pixels, over the limit of 120,000,000",
    "nul\0.png": "'nul\\x00.png': embedded null byte",
    "http://a.b/c": "http://a.b/c: pictures behind urls are not fetched; download it and give the path",
    "data:image/png;base64,!": "data:image/png;base64,!: broken base64 (…",
    "data:image/png;base64,": "picture in the row: empty file (0 bytes)",
    "": "picture: must be a path, bytes or an image, not ''",
    7: "picture: must be a path, bytes or an image, not 7",
    None: "picture: must be a path, bytes or an image, not None",
    b"": "picture in the row: empty file (0 bytes)",
    b"hello": "picture in the row: not a picture (it starts with b'hello')",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The current folder, with broken picture files."""
    noise = encoded(Image.effect_noise((64, 64), 90))
    (tmp_path / "folder").mkdir()
    jpeg = encoded(Image.effect_noise((64, 64), 90), "JPEG")
    files = {"empty.png": b"", "text.png": b"<!DOCTYPE html>", "cut.png": noise[:len(noise) // 2],
             "cut.jpg": jpeg[:900], "bomb.png": png_header(50_000, 50_000)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", BAD, ids=repr)
def test_a_bad_picture_is_named_with_what_is_wrong(source, broken):
    with pytest.raises(MediaError) as caught:
        read_medium(source, Path())
    said, expected = str(caught.value), BAD[source]
    assert said.startswith(expected[:-1]) if expected.endswith("…") else said == expected


@pytest.mark.parametrize("source", [
    {}, {"bytes": "text"}, {"bytes": 10**12}, {"bytes": [1, 2]}, {"path": 3}, {"path": {"path": "a.png"}},
    [], [[1]], 1.5, True, "\ud800.png", "x" * 5000,
], ids=lambda source: repr(source)[:20])
def test_whatever_else_a_row_gives_is_a_media_error_too(source, broken):
    with pytest.raises(MediaError):
        read_medium(source, Path())


def test_a_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="over the limit"):
        media.decode(png_header(media.MAX_PIXELS + 1, 1), "bomb.png")

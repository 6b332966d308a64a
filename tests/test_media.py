"""Every picture comes out as the upright RGB image that a person sees, every sound as samples at the right rate, every clip
as frames with their times, or as an error that names it."""

import base64
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from lib.media import media
from lib.media.clips import Clip
from lib.media.media import MediaError, Decoding, open_medium, poster, read_medium

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
    "a.png", Path("a.png"), {"path": "a.png"}, {"path": "a.png", "bytes": None}, {"image": "a.png"}, "file://a.png",
], ids=str)
def test_a_picture_by_path_is_found_beside_the_data_file_and_stays_a_path(source, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    record, image = read_medium(source, tmp_path)
    assert record == {"kind": "image", "path": str(tmp_path / "a.png"), "bytes": None,
                      "sha256": hashlib.sha256(PNG).hexdigest(), "width": 1, "height": 1, "seconds": None}
    assert pixels(image) == pixels(open_medium(record, Decoding())) == [RED]


@pytest.mark.parametrize("start", ["file://", "FILE://localhost"])
def test_a_file_url_is_the_path_in_it_with_its_characters(start, tmp_path):
    name = tmp_path / "ä b%20.png"
    name.write_bytes(PNG)
    for written in (quote(str(name)), str(name).replace("%", "%25")):
        assert read_medium(start + written, Path("elsewhere"))[0]["path"] == str(name)


@pytest.mark.parametrize("source", [
    PNG, bytearray(PNG), {"bytes": PNG, "path": None}, {"bytes": PNG, "path": "elsewhere.png"},
    Image.new("RGB", (1, 1), RED), "data:image/png;base64," + base64.b64encode(PNG).decode(),
    "data:;base64," + base64.encodebytes(PNG).decode(),
], ids=lambda source: type(source).__name__)
def test_a_picture_in_the_row_is_kept_as_bytes(source, tmp_path):
    record, image = read_medium(source, tmp_path)
    assert record["path"] is None and record["sha256"] == hashlib.sha256(record["bytes"]).hexdigest()
    assert pixels(image) == pixels(open_medium(record, Decoding())) == [RED]


BAD = {  # what a row gives: what is said
    "a.png": "a.png: no such file",
    "folder": "'folder': Is a directory",
    "empty.png": "empty.png: empty file (0 bytes)",
    "text.png": "text.png: not a picture (it starts with b'<!DOCTYPE ht')",
    "cut.png": "cut.png: not a readable picture (image file is truncated)",
    "cut.jpg": "cut.jpg: not a readable picture (image file is truncated (…",
    "bomb.png": "bomb.png: 50000x50000 pixels, over the limit of 120,000,000",
    "file:///no/such%20file.png": "/no/such file.png: no such file",
    "file:///a%00b": "'/a\\x00b': embedded null byte",
    "nul\0.png": "'nul\\x00.png': embedded null byte",
    "http://a.b/c": "http://a.b/c: pictures behind urls are not fetched here; give the path of a file",
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


# ---- sounds ----

def tone(hertz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(np.arange(int(rate * seconds)) * hertz * 2 * np.pi / rate)).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int, kind: str = "WAV", **options) -> bytes:
    """The bytes of a sound file."""
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def heard(source, root=Path(), rate=16_000) -> np.ndarray:
    """The samples that a source gives, the same through its record."""
    record, samples = read_medium(source, root, "audio", Decoding(rate))
    assert np.array_equal(samples, open_medium(record, Decoding(rate))) and samples.dtype == np.float32
    assert record["seconds"] == len(samples) / rate and record["kind"] == "audio" and record["width"] is None
    return samples


@pytest.mark.parametrize("kind, options, off", [("WAV", {}, 4e-5), ("WAV", {"subtype": "FLOAT"}, 0), ("FLAC", {}, 4e-5),
                                                ("WAV", {"subtype": "PCM_U8"}, 0.01), ("MP3", {}, 0.1), ("OGG", {}, 0.1)])
def test_a_sound_of_any_kind_comes_out_as_its_samples(kind, options, off):
    found = heard(sound_file(tone(440, 16_000), 16_000, kind, **options))
    assert len(found) == 16_000 and np.abs(found - tone(440, 16_000))[1000:-1000].max() <= off


def test_a_sound_that_only_ffmpeg_reads_is_a_sound():
    av, buffer = pytest.importorskip("av"), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:                     # m4a
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(440, 16_000)[None], format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    found = heard(buffer.getvalue())
    assert abs(len(found) - 16_000) <= 4096 and np.abs(np.fft.rfft(found[2000:10_000])).argmax() == 220


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_tone_at_another_rate_is_the_same_tone(rate):
    found = heard(sound_file(tone(440, rate), rate, subtype="FLOAT"))
    assert abs(len(found) - 16_000) <= 1
    assert np.abs(found - tone(440, 16_000)[:len(found)])[300:-300].max() < 1e-4


def test_what_a_lower_rate_cannot_hold_is_gone_and_not_folded_back():
    found = heard(sound_file(tone(11_000, 48_000), 48_000, subtype="FLOAT"))        # would come back as 5,000 Hz
    assert np.abs(found)[300:-300].max() < 1e-4


def test_channels_are_averaged_along_either_axis():
    left, right = tone(440, 16_000), tone(300, 16_000)
    both = (left + right) / 2
    assert np.abs(heard(sound_file(np.stack([left, right], axis=1), 16_000, subtype="FLOAT")) - both).max() < 1e-7
    for array in (np.stack([left, right]), np.stack([left, right], axis=1)):
        assert np.abs(heard({"array": array, "sampling_rate": 16_000}) - both).max() < 1e-7


@pytest.mark.parametrize("give", [list, np.array, lambda samples: np.round(samples * 2**15).astype(np.int16)],
                         ids=["a list", "float64", "int16"])
def test_an_array_is_a_sound_at_its_rate(give):
    found = heard({"array": give(tone(440, 8_000).astype(float)), "sampling_rate": 8_000})
    assert np.abs(found - tone(440, 16_000)[:len(found)])[300:-300].max() < 1e-4


def test_a_sound_by_path_or_data_uri_or_bytes_is_the_same_sound(tmp_path):
    data = sound_file(tone(440, 16_000), 16_000)
    (tmp_path / "a.wav").write_bytes(data)
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for source in ("a.wav", {"path": "a.wav"}, {"audio": "a.wav"}, data, {"bytes": data, "path": None}, uri):
        assert np.array_equal(heard(source, tmp_path), heard(data))
    assert read_medium("a.wav", tmp_path, "audio")[0]["path"] == str(tmp_path / "a.wav")


BAD_SOUNDS = [
    (b"hello", "sound in the row: not a readable sound ("),
    (b"", "sound in the row: empty file (0 bytes)"),
    ("none.wav", "none.wav: no such file"),
    (7, "sound: must be a path, bytes or an array with its sampling_rate, not 7"),
    ({"array": [0.1, 0.2]}, "sound in the row: an array without sampling_rate"),
    ({"array": [], "sampling_rate": 16_000}, "sound in the row: not a readable sound (it holds no samples)"),
    ({"array": [0.1, float("nan")], "sampling_rate": 16_000}, "sound in the row: not a readable sound (a sample is no f"),
    ({"array": "abc", "sampling_rate": 16_000}, "sound in the row: could not convert string to float"),
    ("https://a.b/c.wav", "https://a.b/c.wav: sounds behind urls are not fetched here; give the path of a file"),
]


@pytest.mark.parametrize("source, said", BAD_SOUNDS, ids=[said for _, said in BAD_SOUNDS])
def test_a_bad_sound_is_named_with_what_is_wrong(source, said):
    with pytest.raises(MediaError) as caught:
        read_medium(source, Path(), "audio")
    assert str(caught.value).startswith(said)


# ---- clips ----

def ramp(frames: int, width: int = 48, height: int = 32) -> np.ndarray:
    """Frames of one grey each, lighter by 8 from one to the next."""
    return np.repeat(np.arange(frames, dtype=np.uint8) * 8, width * height * 3).reshape(frames, height, width, 3)


def clip_file(frames: np.ndarray, rate: int = 8, container: str = "mp4", codec: str = "mpeg4", rotation: int = 0) -> bytes:
    """The bytes of a video file."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def seen(source, root=Path(), fps=None, at_most=None) -> Clip:
    """The clip that a source gives, the same through its record."""
    decoding = Decoding(video_fps=fps, video_max_frames=at_most)
    record, clip = read_medium(source, root, "video", decoding)
    again = open_medium(record, decoding)
    assert np.array_equal(clip.frames, again.frames) and clip.indices == again.indices
    assert (record["height"], record["width"]) == clip.frames.shape[1:3] and record["seconds"] == clip.seconds
    return clip


@pytest.mark.parametrize("container, codec", [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
def test_every_frame_of_a_file_comes_out_in_its_place(container, codec):
    clip = seen(clip_file(ramp(20), 8, container, codec))
    assert clip.indices == tuple(range(20)) and clip.total == 20 and clip.fps == 8 and clip.seconds == 2.5
    assert np.abs(clip.frames.astype(int) - ramp(20)).max() <= 6


@pytest.mark.parametrize("fps, at_most, indices", [
    (2, None, (0, 4, 8, 12, 16)), (2, 3, (0, 6, 13)), (0.1, None, (0,)), (100, None, tuple(range(20))), (None, 1, (0,)),
])
def test_a_clip_is_sampled_evenly_by_rate_and_number(fps, at_most, indices):
    clip = seen(clip_file(ramp(20), 8), fps=fps, at_most=at_most)
    assert clip.indices == indices and clip.total == 20
    assert np.abs(clip.frames[:, 0, 0, 0].astype(int) - 8 * np.array(indices)).max() <= 6
    assert clip.metadata == {"total_num_frames": 20, "fps": 8.0, "duration": 2.5, "frames_indices": list(indices)}


def test_frames_in_a_row_are_a_clip_without_loss(tmp_path):
    frames = ramp(3)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    paths = [f"{number}.png" for number in range(3)]
    pictures = [Image.fromarray(frame) for frame in frames]
    for source in (paths, pictures, [paths[0], *pictures[1:]], frames, {"array": frames.tolist()}):
        clip = seen(source, tmp_path, fps=2.0, at_most=2)               # as given: the knobs sample files
        assert np.array_equal(clip.frames, frames) and clip.indices == (0, 1, 2) and clip.fps == 2.0
    record, _ = read_medium(paths, tmp_path, "video")
    assert json.loads(record["bytes"]) == [str(path) for path in media.files_of(record)] == [str(tmp_path / p) for p in paths]


BAD_CLIPS = [
    (b"hello", "clip in the row: not a readable clip ("),
    ([], "clip: an empty list of frames"),
    (["none.png"], "none.png: no such file"),
    (7, "clip: must be a path, bytes or frames, not 7"),
    (np.zeros((2, 4, 4), np.uint8), "clip in the row: an array of shape [2, 4, 4], not [frames, height, width, 3]"),
    (np.full((1, 4, 4, 3), 0.5), "clip in the row: its values aren't whole numbers from 0 to 255"),
    ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "clip in the row: not a readable clip (frames of several sizes)"),
]


@pytest.mark.parametrize("source, said", BAD_CLIPS, ids=[said for _, said in BAD_CLIPS])
def test_a_bad_clip_is_named_with_what_is_wrong(source, said):
    with pytest.raises(MediaError) as caught:
        read_medium(source, Path(), "video")
    assert str(caught.value).startswith(said)


def test_a_clip_that_was_cut_off_or_has_only_sound_is_refused():
    for data in (clip_file(ramp(20))[:900], sound_file(tone(440, 16_000), 16_000)):
        with pytest.raises(MediaError, match="not a readable clip"):
            read_medium(data, Path(), "video")


def test_every_medium_has_a_picture_for_people(tmp_path):
    (tmp_path / "speech.wav").write_bytes(sound_file(tone(440, 16_000), 16_000))
    sound = poster(read_medium("speech.wav", tmp_path, "audio")[0])
    assert sound.size[0] > 200 and sound.getextrema() != ((255, 255),) * 3
    clip = poster(read_medium(ramp(5)[2:], tmp_path, "video")[0])
    assert pixels(clip)[:1] == [(16, 16, 16)] and clip.size == (48, 32)
    assert pixels(poster(read_medium(PNG, tmp_path)[0])) == [RED]

"""media: pictures, sounds and clips from anything that a row holds, as the processor will see them.

Every decode in the kit goes through `decode`: in 02, where a bad medium is found, and in 05's workers and in
06, where none can be bad any more. What they become is in lib/pictures.py, sounds.py and clips.py.

Fork me to: take media from elsewhere (`locate`), or make something else of them (`decode`).
"""
import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib import clips, sounds
from lib.messages import NOUNS
from lib.pictures import fitted, to_rgb
from lib.stage import StageError

MAX_PIXELS = 120_000_000       # 360 MB decoded; anything above is a mistake or a bomb
Image.MAX_IMAGE_PIXELS = None  # PIL only warns, up to twice its own limit; ours is checked before decoding
KIND_OF = {suffix: "audio" for suffix in (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus")} | {
    suffix: "video" for suffix in (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg")}


class MediaError(ValueError):
    """A medium that can't be used: MediaError(path or name, why)."""

    def __init__(self, name: Path | str, why: str):
        super().__init__(f"{name}: {why}")
        self.name = name


@dataclass(frozen=True)
class Sampling:
    """How media are read: samples a second; frames a second (None: all), and how many at most.

    Every picture is fitted into image_width x image_height, where these are given.
    """
    sampling_rate: int = 16_000
    video_fps: float | None = None
    video_max_frames: int | None = None
    image_width: int | None = None
    image_height: int | None = None
    image_resize_algorithm: str = "bilinear"


def read_medium(source, root: Path, kind: str = "image", sampling=Sampling()) -> tuple[dict, object]:
    """(media record, what `open_medium` gives) of a path, bytes, a data uri, {path, bytes}, a PIL image …

    A sound may be {array, sampling_rate}; a clip an array, or a list of its frames in any of these forms.
    The record is {kind, path, bytes, sha256, width, height, seconds}. Paths are relative to `root` and stay
    paths in it; bytes are kept in it. MediaError if there is no such medium to be had.
    """
    if kind == "video" and isinstance(source, (list, tuple)):
        path, data = None, frames_in_row(source, root)
    else:
        path, data = locate(source, root, kind)
    raw = data if data is not None else read_file(path)
    medium = decode(raw, path or f"{NOUNS[kind]} in the row", kind, sampling)
    record = {"kind": kind, "path": str(path) if data is None else None, "bytes": data,
              "sha256": hashlib.sha256(raw).hexdigest(), "width": None, "height": None, "seconds": None}
    if kind == "image":
        record |= {"width": medium.width, "height": medium.height}
    elif kind == "audio":
        record |= {"seconds": len(medium) / sampling.sampling_rate}
    else:
        height, width = medium.frames.shape[1:3]
        record |= {"width": width, "height": height, "seconds": medium.seconds}
    return record, medium


def open_medium(record: dict, sampling: Sampling):
    """A sample's medium by its record: an RGB image, samples [N] in float32, or a Clip."""
    path, data = record["path"], record["bytes"]
    raw = data if data is not None else read_file(Path(path))
    return decode(raw, path or record["sha256"], record["kind"], sampling)


def poster(record: dict) -> Image.Image:
    """A picture for people: the picture itself, a clip's first frame, or how loud a sound is."""
    medium = open_medium(record, Sampling(video_max_frames=1))
    if record["kind"] == "audio":
        name = Path(record["path"] or "in the row").name
        return sounds.poster(medium, f"{name}, {record['seconds']:.1f} s")
    return Image.fromarray(medium.frames[0]) if record["kind"] == "video" else medium


def files_of(record: dict) -> list[Path]:
    """The files that a medium's record reads."""
    if is_playlist(record["bytes"]):
        return [Path(path) for path in json.loads(record["bytes"])]
    return [Path(record["path"])] if record["path"] is not None else []


def shown(url: str) -> str:
    """A url as messages show it, in one line."""
    return url if len(url) <= 120 else f"{url[:119]}…"


def url_of(source) -> str | None:
    """The address of a medium that a row names by one, None for any other."""
    if isinstance(source, dict):
        if any(source.get(key) is not None for key in ("array", "bytes", "base64")):
            return None
        given = map(source.get, ("path", "url", *NOUNS))
        source = next((value for value in given if value is not None), None)
    is_url = isinstance(source, str) and source.lower().startswith(("http://", "https://"))
    return source if is_url else None


# ---- where it is -----------------------------------------------------------------------------------------

def locate(source, root: Path, kind: str = "image") -> tuple[Path | None, bytes | None]:
    """(path, None) for a file, (None, bytes) for anything that is only in the row."""
    if isinstance(source, dict) and source.get("array") is not None:
        return None, in_a_file(source["array"], kind, source.get("sampling_rate"))
    if isinstance(source, dict):
        keys = ("bytes", "path", kind, "url", "base64")
        source = next((source[key] for key in keys if source.get(key) is not None), None)
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return None, buffer.getvalue()
    if isinstance(source, (bytes, bytearray)):
        return None, bytes(source)
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):                # an array or a tensor
        return None, in_a_file(source, kind, None)
    noun = NOUNS[kind]
    if not isinstance(source, (str, Path)) or not str(source):
        forms = {"image": "an image", "audio": "an array with its sampling_rate", "video": "frames"}[kind]
        raise MediaError(noun, f"must be a path, bytes or {forms}, not {source!r:.40}")
    text = str(source)
    if text.startswith("data:"):
        return None, from_base64(text)
    if text.startswith(("http://", "https://")):
        raise MediaError(f"{text:.80}", f"{noun}s behind urls are not fetched here; give the path of a file")
    return root / text, None


def in_a_file(array, kind: str, sampling_rate) -> bytes:
    """The bytes of a lossless file that holds an array; a MediaError where it can be no such medium."""
    name = f"{NOUNS[kind]} in the row"
    try:
        if kind == "video":
            return clips.as_tiff(clips.frames_of(array))
        if kind == "audio" and isinstance(sampling_rate, int) and sampling_rate > 0:
            return sounds.as_wav(array, sampling_rate)
    except (ValueError, TypeError, RuntimeError) as error:
        raise MediaError(name, str(error)) from None
    raise MediaError(name, "an array without sampling_rate" if kind == "audio" else "an array is no picture")


def frames_in_row(frames, root: Path) -> bytes:
    """The list of a clip's frames, if these are files, else a TIFF of them."""
    places = [locate(frame, root) for frame in frames]
    if places and all(path is not None for path, _ in places):
        return json.dumps([str(path) for path, _ in places], ensure_ascii=False).encode()
    pictures = [decode(data if data is not None else read_file(path), path or "frame in the row")
                for path, data in places]
    if not pictures:
        raise MediaError("clip", "an empty list of frames")
    return clips.as_tiff(pictures)


def is_playlist(raw: bytes | None) -> bool:
    """Whether bytes are the paths of a clip's frames."""
    return raw is not None and raw.startswith(b'["')


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


# ---- what it is ------------------------------------------------------------------------------------------

def decode(raw: bytes, name, kind: str = "image", sampling: Sampling = Sampling()):
    """A picture as `to_rgb` gives it, a sound's samples or a Clip; a MediaError if that can't be had."""
    if not raw:
        raise MediaError(name, "empty file (0 bytes)")
    try:
        if kind == "audio":
            return sounds.decode(raw, sampling.sampling_rate)
        if is_playlist(raw):
            return clips.of_frames([decode(read_file(Path(path)), path) for path in json.loads(raw)],
                                   sampling.video_fps)
        if kind == "video":
            return clips.decode(raw, sampling.video_fps, sampling.video_max_frames)
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height <= MAX_PIXELS:
            upright = to_rgb(ImageOps.exif_transpose(image))                # an animation's first frame
            return upright if sampling.image_width is None else fitted(
                upright, (sampling.image_width, sampling.image_height), sampling.image_resize_algorithm)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(name, f"not a picture (it starts with {raw[:12]!r})") from None
    except ImportError as error:
        raise StageError(f"{NOUNS[kind]}s need {error.name}, not installed here",
                         "pip install soundfile av") from None
    except Exception as error:  # decoders raise whatever they like: one of the kit's three boundaries
        why = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(name, f"not a readable {NOUNS[kind]} ({why})") from None
    raise MediaError(name, f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}")


def kind_of(medium) -> str:
    """What a decoded medium is."""
    if isinstance(medium, Image.Image):
        return "image"
    return "video" if isinstance(medium, clips.Clip) else "audio"

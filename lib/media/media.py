"""media: pictures, sounds and clips from anything that a row holds, as the processor will see them.

All media are decoded by `decode`: in 02, which rejects bad ones, and in 05's workers and in 06, which only
get good ones. lib/media/pictures.py, sounds.py and clips.py do it for each kind.

Fork me to: decode media in another way (`decode`); lib/media/locating.py finds where they are.
"""
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lib.data.parts import NOUNS
from lib.media import clips, sounds
from lib.media.locating import MediaError, locate, read_file
from lib.media.pictures import fitted, to_rgb
from lib.run.errors import StageError, one_line

MAX_PIXELS = 120_000_000       # 360 MB decoded; anything above is a mistake or a bomb
Image.MAX_IMAGE_PIXELS = None  # PIL only warns, up to twice its own limit; ours is checked before decoding
KIND_OF = {suffix: "audio" for suffix in (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus")} | {
    suffix: "video" for suffix in (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg")}


@dataclass(frozen=True)
class Decoding:
    """How media are decoded.

    Sounds have sampling_rate samples a second; clips give video_fps frames a second (None: all), at most
    video_max_frames. Every picture is fitted into image_width x image_height, where these are given.
    """
    sampling_rate: int = 16_000
    video_fps: float | None = None
    video_max_frames: int | None = None
    image_width: int | None = None
    image_height: int | None = None
    image_resize_algorithm: str = "bilinear"


def read_medium(source, root: Path, kind: str = "image", decoding=Decoding()) -> tuple[dict, object]:
    """(media record, decoded medium) of a path, bytes, a data uri, {path, bytes}, a PIL image …

    A sound may be {array, sampling_rate}; a clip an array, or a list of its frames in any of these forms.
    The record is {kind, path, bytes, sha256, width, height, seconds}; it holds a path, which `source` gives
    relative to `root`, or the bytes. Raises MediaError where the medium can't be found or decoded.
    """
    if kind == "video" and isinstance(source, (list, tuple)):
        path, data = None, frames_in_row(source, root)
    else:
        path, data = locate(source, root, kind)
    raw = data if data is not None else read_file(path)
    medium = decode(raw, path or f"{NOUNS[kind]} in the row", kind, decoding)
    record = {"kind": kind, "path": str(path) if data is None else None, "bytes": data,
              "sha256": hashlib.sha256(raw).hexdigest(), "width": None, "height": None, "seconds": None}
    if kind == "image":
        record |= {"width": medium.width, "height": medium.height}
    elif kind == "audio":
        record |= {"seconds": len(medium) / decoding.sampling_rate}
    else:
        height, width = medium.frames.shape[1:3]
        record |= {"width": width, "height": height, "seconds": medium.seconds}
    return record, medium


def open_medium(record: dict, decoding: Decoding):
    """The decoded medium of a media record: an RGB image, a sound's samples [N] in float32, or a Clip.

    Raises MediaError where its file holds something else than when the record was made.
    """
    path, data = record["path"], record["bytes"]
    raw = data if data is not None else read_file(Path(path))
    if hashlib.sha256(raw).hexdigest() != record["sha256"]:
        raise MediaError(path, "not the file that 02_data read")
    return decode(raw, path or record["sha256"], record["kind"], decoding)


def poster(record: dict) -> Image.Image:
    """A medium as a picture for people: itself, a clip's first frame, or a drawing of a sound's loudness."""
    medium = open_medium(record, Decoding(video_max_frames=1))
    if record["kind"] == "audio":
        name = Path(record["path"] or "in the row").name
        return sounds.poster(medium, f"{name}, {record['seconds']:.1f} s")
    return Image.fromarray(medium.frames[0]) if record["kind"] == "video" else medium


def files_of(record: dict) -> list[Path]:
    """The files that a medium's record reads."""
    if is_playlist(record["bytes"]):
        return [Path(path) for path in json.loads(record["bytes"])]
    return [Path(record["path"])] if record["path"] is not None else []


def frames_in_row(frames, root: Path) -> bytes:
    """A clip's frames as bytes: the list of their paths as JSON if all are files, else one TIFF."""
    places = [locate(frame, root) for frame in frames]
    if places and all(path is not None for path, _ in places):
        return json.dumps([str(path) for path, _ in places], ensure_ascii=False).encode()
    pictures = [decode(data if data is not None else read_file(path), path or "frame in the row")
                for path, data in places]
    if not pictures:
        raise MediaError("clip", "an empty list of frames")
    return clips.as_tiff(pictures)


def is_playlist(raw: bytes | None) -> bool:
    """Whether bytes are a JSON list of the paths of a clip's frames."""
    return raw is not None and raw.startswith(b'["')


def decode(raw: bytes, name, kind: str = "image", decoding: Decoding = Decoding()):
    """The decoded medium in bytes: an RGB picture, a sound's samples or a Clip; MediaError if it is none."""
    if not raw:
        raise MediaError(name, "empty file (0 bytes)")
    try:
        if kind == "audio":
            return sounds.decode(raw, decoding.sampling_rate)
        if is_playlist(raw):
            return clips.of_frames([decode(read_file(Path(path)), path) for path in json.loads(raw)],
                                   decoding.video_fps)
        if kind == "video":
            return clips.decode(raw, decoding.video_fps, decoding.video_max_frames)
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(name, f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}")
        upright = to_rgb(ImageOps.exif_transpose(image))                    # an animation's first frame
        return upright if decoding.image_width is None else fitted(
            upright, (decoding.image_width, decoding.image_height), decoding.image_resize_algorithm)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(name, f"not a picture (it starts with {raw[:12]!r})") from None
    except ImportError as error:
        raise StageError(f"{NOUNS[kind]}s need {error.name}, not installed here",
                         "pip install soundfile av") from None
    except Exception as error:  # decoders raise whatever they like: one of the kit's three boundaries
        raise MediaError(name, f"not a readable {NOUNS[kind]} ({one_line(error)})") from None


def kind_of(medium) -> str:
    """The kind of a decoded medium: "image", "video" or "audio"."""
    if isinstance(medium, Image.Image):
        return "image"
    return "video" if isinstance(medium, clips.Clip) else "audio"

"""locating: where a medium is, from anything by which a row names it: a path, bytes, a url, an array, base64.

Fork me to: take media from elsewhere (`locate`).
"""
import base64
import io
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from lib.data.parts import NOUNS
from lib.data.shapes import first_of
from lib.media import clips, sounds

FILE_URL = re.compile(r"file://(localhost(?=/))?", re.IGNORECASE)


class MediaError(ValueError):
    """A medium that can't be used: MediaError(path or name, why)."""

    def __init__(self, name: Path | str, why: str):
        super().__init__(f"{name}: {why}")
        self.name = name


def url_of(source) -> str | None:
    """The address of a medium that a row names by one, None for any other."""
    if isinstance(source, dict):
        if any(source.get(key) is not None for key in ("array", "bytes", "base64")):
            return None
        source = first_of(source, ("path", "url", *NOUNS))
    is_url = isinstance(source, str) and source.lower().startswith(("http://", "https://"))
    return source if is_url else None


def locate(source, root: Path, kind: str = "image") -> tuple[Path | None, bytes | None]:
    """(path, None) for a file, (None, bytes) for anything that is only in the row.

    A file:// url is the path in it, its %20 and the like read as the characters that they stand for.
    """
    if isinstance(source, dict) and source.get("array") is not None:
        return None, in_a_file(source["array"], kind, source.get("sampling_rate"))
    if isinstance(source, dict):
        source = first_of(source, ("bytes", "path", kind, "url", "base64"))
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
        try:
            return None, base64.b64decode("".join(text.partition(",")[2].split()), validate=True)
        except ValueError as error:
            raise MediaError(f"{text:.40}", f"broken base64 ({error})") from None
    if text.startswith(("http://", "https://")):
        raise MediaError(f"{text:.80}", f"{noun}s behind urls are not fetched here; give the path of a file")
    if url := FILE_URL.match(text):
        text = unquote(text[url.end():])
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


def read_file(path: Path) -> bytes:
    """A file's bytes, or a MediaError that names it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except (OSError, ValueError) as error:              # ValueError: a name with a zero byte
        raise MediaError(f"{str(path)!r:.200}", getattr(error, "strerror", None) or str(error)) from None

"""parts: the parts of a message's content, in any usual way of writing them: text, and places of media.

Fork me to: read another kind of part (`part_of`).
"""
from lib.data.shapes import NOTHING, first_of, name_of, shortened
from lib.run.errors import RowError

NOUNS = {"image": "picture", "audio": "sound", "video": "clip"}        # what a person calls a kind
PLACES = ("path", "url", "bytes")                    # keys under which a part may name its medium
OPENAI = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
READ = {"type", *PLACES, "base64", "array", "sampling_rate", "format"}      # of a part with its own medium
KNOBS = {"detail": "image_max_pixels", "max_pixels": "image_max_pixels", "min_pixels": "image_min_pixels",
         "resized_height": "image_size", "resized_width": "image_size", "fps": "video_fps",
         "nframes": "video_max_frames", "max_frames": "video_max_frames"}   # what does a key's work for all


def part_of(part, number: int) -> dict:
    """A part of a message's content; a medium's has "source", None where a column is to fill it.

    Such a one may have "index", its place in that column. RowError for a key that says more than is read.
    """
    part = plain(part) if isinstance(part, dict) else part
    kind = part.get("type") if isinstance(part, dict) else name_of(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RowError(f"message {number} has a text part without a text",
                           'write {"type": "text", "text": …}')
        refuse_unread(part, number, {"type", "text"})
        return {"type": "text", "text": part["text"]}
    if isinstance(kind, str) and kind in NOUNS:
        source = first_of(part, (kind, *PLACES))
        if part.get("base64") is not None:
            source = f"data:;base64,{part['base64']}"
        if part.get("array") is not None:
            source = {key: part[key] for key in ("array", "sampling_rate") if key in part}
        refuse_unread(part, number, READ | {kind} | ({"index"} if source is None else set()))
        index = {} if source is not None or part.get("index") is None else {"index": part["index"]}
        return {"type": kind, "source": source, **index}
    raise RowError(f"message {number} has a part of type {shortened(repr(kind))}",
                   f"use text, {', '.join(NOUNS)}")


def plain(part: dict) -> dict:
    """A part of OpenAI's as one of the kit's: image_url (and video_url, audio_url) and input_audio.

    A detail of auto or high is what pictures have anyway: they are as large as the recipe lets them be.
    """
    word = part.get("type")
    if not isinstance(word, str) or word not in OPENAI:
        return part
    held = dict(part[word]) if isinstance(part.get(word), dict) else {"url": part.get(word)}
    if held.get("detail") in ("auto", "high"):
        del held["detail"]
    if "data" in held:
        held["base64"] = held.pop("data")
    return {**part, word: None, **held, "type": OPENAI[word]}


def refuse_unread(part: dict, number: int, read: set[str]) -> None:
    """RowError for a key with a value that changes nothing here, but would for its writer."""
    for key, value in part.items():
        if key not in read and value not in NOTHING:
            knob = KNOBS.get(key, "")
            instead = f"; {knob} is for all" if knob.startswith(part["type"]) else ""
            raise RowError(f"message {number} has {shortened(repr(key))} in a part of type {part['type']!r}, "
                           "which isn't read", f"remove that key{instead}")

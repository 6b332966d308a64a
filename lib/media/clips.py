"""clips: moving pictures as frames with their times, from a file or from frames that a row gives."""
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageSequence


@dataclass(frozen=True)
class Clip:
    """Frames of a clip, [F, height, width, 3] uint8; the n-th is frame indices[n] of `total`, shown at `fps`.
    """
    frames: np.ndarray
    indices: tuple[int, ...]
    total: int
    fps: float

    @property
    def seconds(self) -> float:
        """How long the whole clip lasts."""
        return self.total / self.fps

    @property
    def metadata(self) -> dict:
        """What a video processor has to know about frames that are sampled already."""
        return {"total_num_frames": self.total, "fps": self.fps, "duration": self.seconds,
                "frames_indices": list(self.indices)}


def decode(raw: bytes, fps: float | None, at_most: int | None) -> Clip:
    """The clip in a file's bytes, sampled `fps` times a second; None: every frame.

    A TIFF holds the frames that a row gave (`as_tiff`): these are taken as they are. Raises whatever the
    decoder raises where the bytes are no clip.
    """
    if raw[:4] in (b"II*\0", b"MM\0*"):
        pages = ImageSequence.Iterator(Image.open(io.BytesIO(raw)))
        return of_frames([page.convert("RGB") for page in pages], fps)
    import av
    with av.open(io.BytesIO(raw)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        total = sum(packet.pts is not None and not packet.is_discard for packet in container.demux(stream))
        rate = float(stream.average_rate or stream.guessed_rate or 1)
        chosen = sampled(total, rate, fps, at_most)
        container.seek(0)
        wanted, frames = set(chosen), []
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            if index == chosen[-1]:
                break
    if len(frames) < len(chosen):
        raise ValueError(f"frame {chosen[len(frames)]} of {total} is missing")
    return Clip(np.stack(frames), tuple(chosen), total, rate)


def sampled(total: int, rate: float, fps: float | None, at_most: int | None) -> list[int]:
    """The indices of the frames taken of a clip: `fps` a second, at most `at_most`, evenly spread."""
    if not total:
        raise ValueError("it has no frames")
    count = total if fps is None else max(1, round(total / rate * fps))
    count = min(count, total, at_most or total)
    return [n * total // count for n in range(count)]


def of_frames(pictures: list[Image.Image], fps: float | None) -> Clip:
    """A clip of these frames, which are `fps` a second (None: one)."""
    if len({picture.size for picture in pictures}) != 1:
        raise ValueError("frames of several sizes" if pictures else "it has no frames")
    frames = np.stack([np.asarray(picture) for picture in pictures])
    return Clip(frames, tuple(range(len(frames))), len(frames), float(fps or 1))


def as_tiff(frames: list[Image.Image]) -> bytes:
    """RGB pictures as one file, a losslessly compressed TIFF."""
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_deflate")
    return buffer.getvalue()


def frames_of(array) -> list[Image.Image]:
    """The frames of an array [F, height, width, 3] with values from 0 to 255."""
    array = np.asarray(array)
    if array.ndim != 4 or array.shape[-1] != 3 or not array.shape[0]:
        raise ValueError(f"an array of shape {list(array.shape)}, not [frames, height, width, 3]")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ValueError("its values aren't whole numbers from 0 to 255")
    return [Image.fromarray(frame) for frame in array.astype(np.uint8)]

"""sounds: sound files and arrays as feature extractors take them: mono, float32, at their sampling rate."""
import io

import numpy as np
from PIL import Image, ImageDraw

POSTER = (224, 64)                        # pixels


def decode(raw: bytes, sampling_rate: int) -> np.ndarray:
    """The samples [N] of a sound file of any usual kind, channels averaged, at this sampling rate.

    Raises whatever the decoder raises where the bytes are no sound.
    """
    import soundfile
    try:
        samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)  # [N, channels]
    except soundfile.LibsndfileError as error:
        samples, rate = by_ffmpeg(raw, error)
    if not len(samples) or not np.isfinite(samples).all():
        raise ValueError("it holds no samples" if not len(samples) else "a sample is no finite number")
    return resampled(np.ascontiguousarray(samples.mean(axis=1)), rate, sampling_rate)


def by_ffmpeg(raw: bytes, error: Exception) -> tuple[np.ndarray, int]:
    """(samples [N, channels], their rate) of a file that soundfile can't read, such as m4a.

    error: soundfile's, raised where FFmpeg can't read it, either.
    """
    import av
    try:
        with av.open(io.BytesIO(raw)) as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", rate=stream.rate)
            frames = [frame for coded in container.decode(stream) for frame in resampler.resample(coded)]
            return np.concatenate([frame.to_ndarray() for frame in frames], axis=1).T, stream.rate
    except (av.FFmpegError, IndexError, ValueError):
        raise error from None


def resampled(mono: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound at another rate, by FFmpeg's swresample, which filters out what is above half the new rate."""
    if rate == wanted:
        return mono
    import av
    resampler = av.AudioResampler(format="flt", layout="mono", rate=wanted)
    frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
    frame.rate = rate
    pieces = [*resampler.resample(frame), *resampler.resample(None)]          # None: the rest
    return np.concatenate([piece.to_ndarray()[0] for piece in pieces])


def as_wav(array, rate: int) -> bytes:
    """A wav file of samples [N] or of channels along either axis, given as floats or 16- or 32-bit integers.
    """
    import soundfile
    samples = np.asarray(array)
    loudest = 2 ** (8 * samples.dtype.itemsize - 1) if samples.dtype in (np.int16, np.int32) else 1
    samples = samples.astype(np.float32) / np.float32(loudest)
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T                                                               # [N, channels]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def poster(samples: np.ndarray, caption: str) -> Image.Image:
    """A picture of a sound for people: its loudness over time, and a caption."""
    image = Image.new("RGB", POSTER, "white")
    draw, middle = ImageDraw.Draw(image), POSTER[1] // 2 + 6
    loudest = float(np.abs(samples).max()) or 1.0
    for x, piece in enumerate(np.array_split(samples, POSTER[0])):
        height = round(20 * float(np.abs(piece).max(initial=0)) / loudest)
        draw.line((x, middle - height, x, middle + height), "#4477aa")
    draw.text((2, 0), caption.encode("ascii", "replace").decode(), "black")    # the font has no more
    return image

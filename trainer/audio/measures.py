"""What can be said of a sound without any model: is it there, is it whole, is it clean."""

import numpy as np

from trainer.shapes import Float

from .loudness import integrated

_FRAME_SECONDS = 0.05
_SILENT_DBFS = -60.0
_CLIPPED = 0.999
_LOUDNESS_FLOOR = -70.0
_PEAK_FLOOR = -120.0


def measure(
    audio: Float[np.ndarray, "C N"], sample_rate: int, requested_seconds: float | None = None
) -> dict[str, float]:
    """Weight-free measures of ``audio``; every value is finite, also for silent, empty or broken sound.

    Frames are 50 ms; a frame's level is its RMS over all channels, and 0 dBFS is an RMS of 1.

    Returns:
        ``seconds``: length.
        ``duration_reached``: length ÷ ``requested_seconds`` (only if that is given).
        ``silence_ratio``: share of frames below -60 dBFS; 1 for an empty sound.
        ``longest_silence_seconds``: the longest run of such frames.
        ``clipping_ratio``: share of samples at or beyond ±0.999 in any channel.
        ``peak_dbfs``: largest absolute sample in dB, at least -120.
        ``loudness_lufs``: integrated loudness (BS.1770-4), at least -70.
        ``dc_offset``: the channel mean that is farthest from 0.
    """
    audio = np.nan_to_num(np.asarray(audio, dtype=np.float32), nan=0.0, posinf=1.0, neginf=-1.0)
    seconds = audio.shape[1] / sample_rate
    silent = _silent_frames(audio, sample_rate)
    peak = float(np.abs(audio).max(initial=0.0))
    means = audio.mean(axis=1) if audio.shape[1] else np.zeros(1)
    measures = {
        "seconds": seconds,
        "silence_ratio": float(silent.mean()) if len(silent) else 1.0,
        "longest_silence_seconds": min(seconds, _longest_run(silent) * _FRAME_SECONDS),
        "clipping_ratio": float((np.abs(audio) >= _CLIPPED).any(axis=0).mean()) if audio.shape[1] else 0.0,
        "peak_dbfs": max(_PEAK_FLOOR, 20 * np.log10(max(peak, 1e-9))),
        "loudness_lufs": max(_LOUDNESS_FLOOR, integrated(audio, sample_rate)),
        "dc_offset": float(means[np.abs(means).argmax()]),
    }
    if requested_seconds is not None:
        measures["duration_reached"] = seconds / requested_seconds
    return {name: float(value) for name, value in measures.items()}


def _silent_frames(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    frame = round(_FRAME_SECONDS * sample_rate)
    starts = np.arange(0, audio.shape[1], frame)
    if not len(starts):
        return np.zeros(0, dtype=bool)
    power = np.add.reduceat(np.square(audio, dtype=np.float64).mean(axis=0), starts)
    samples = np.diff(np.append(starts, audio.shape[1]))
    return power / samples < 10 ** (_SILENT_DBFS / 10)


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))

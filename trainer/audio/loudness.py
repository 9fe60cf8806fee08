"""Integrated loudness after ITU-R BS.1770-4, and bringing songs to one loudness."""

import warnings

import numpy as np

from trainer.shapes import Float

_BLOCK_SECONDS = 0.4


def integrated(audio: Float[np.ndarray, "C N"], sample_rate: int) -> float:
    """Loudness of the whole in LUFS; ``-inf`` for silence (anything below the standard's gate of -70 LUFS).

    A clip shorter than the standard's 0.4 s block is measured as if it went round and round.
    """
    if audio.shape[1] == 0 or not np.any(audio):
        return -np.inf
    import pyloudnorm  # with scipy.signal, 1.5 s; the driver of a run needs neither when its data are up to date

    block = int(np.ceil(_BLOCK_SECONDS * sample_rate)) + 1
    if audio.shape[1] < block:
        audio = np.tile(audio, (1, -(-block // audio.shape[1])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # log of 0, mean of no blocks: silence, which has its answer
        loudness = float(pyloudnorm.Meter(sample_rate, block_size=_BLOCK_SECONDS).integrated_loudness(audio.T))
    return loudness if np.isfinite(loudness) else -np.inf


def normalise(audio: Float[np.ndarray, "C N"], sample_rate: int, lufs: float) -> Float[np.ndarray, "C N"]:
    """``audio`` at ``lufs``, or as near to it as a plain gain comes without clipping; silence stays as it is."""
    loudness = integrated(audio, sample_rate)
    if not np.isfinite(loudness):
        return audio
    gain = 10 ** ((lufs - loudness) / 20)
    return (audio * min(gain, 1.0 / np.abs(audio).max())).astype(np.float32)

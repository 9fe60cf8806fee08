"""Arrays → audio files."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from trainer.shapes import Float

Format = Literal["wav", "flac", "mp3"]
_SUBTYPES: dict[str, str] = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III"}


def save(path: str | Path, audio: Float[np.ndarray, "C N"], sample_rate: int, format: Format) -> None:
    """Write ``audio`` to ``path``; see ``encode``."""
    Path(path).write_bytes(encode(audio, sample_rate, format))


def encode(audio: Float[np.ndarray, "C N"], sample_rate: int, format: Format) -> bytes:
    """``audio`` as the bytes of a file: 16-bit WAV or FLAC, or MP3. Samples beyond ±1 are clipped."""
    buffer = io.BytesIO()
    samples = np.clip(audio, -1.0, 1.0).astype(np.float32).T
    soundfile.write(buffer, samples, sample_rate, subtype=_SUBTYPES[format], format=format.upper())
    return buffer.getvalue()

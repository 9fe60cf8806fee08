"""Audio files → arrays: whole, undamaged, at the rate and channels asked for."""

from pathlib import Path

import av
import av.error
import numpy as np
import soundfile
import torch
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from torchaudio.functional import resample

from trainer.shapes import Float
from trainer.spec.errors import DataError

SUFFIXES = (".wav", ".flac", ".aiff", ".aif", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".aac", ".wma", ".alac")
"""Endings of the files that are audio to us. What is inside decides how a file is read."""
_CURE = "export or download the song again, or leave this file out"
_DEMUXERS = "mov,mp4,m4a,mp3,ogg,asf,aac,flac,wav,aiff,caf,matroska,webm"
"""FFmpeg's formats that hold nothing but media; its playlists could name other files and addresses."""


def load(path: str | Path, sample_rate: int, channels: int) -> Float[np.ndarray, "C N"]:
    """The sound of an audio file.

    Args:
        path: wav, flac, aiff, alac, mp3, ogg, m4a, aac, wma, opus, ….
        sample_rate: in Hz; the sound is resampled to it.
        channels: mono is copied to every channel and made as the mean; channels too many are shared out.

    Returns:
        [C, N] float32.

    Raises:
        DataError: the file is missing, empty, damaged or cut off.
    """
    path = _checked(Path(path))
    audio, rate = _decode(path)
    if audio.shape[1] == 0:
        raise DataError(f"{path}: holds no sound (0 samples)", _CURE)
    if not np.isfinite(audio).all():
        raise DataError(f"{path}: holds samples that are not numbers", _CURE)
    audio = _mix(audio, channels)
    if rate != sample_rate:
        audio = resample(torch.from_numpy(audio), rate, sample_rate).numpy()
    return np.ascontiguousarray(audio, dtype=np.float32)


def duration(path: str | Path) -> float:
    """Length in seconds as the file's header states it; a file whose header does not say is decoded.

    Raises:
        DataError: as ``load``.
    """
    path = _checked(Path(path))
    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError:
        pass
    with _open(path) as container:
        declared = _declared_seconds(container)
    if declared is not None:
        return declared
    audio, rate = _decode(path)
    return audio.shape[1] / rate


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file", "check the path")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: is an empty file (0 bytes)", _CURE)
    if _cut_off(path, size):
        raise DataError(f"{path}: is cut off (its header announces more than the file holds)", _CURE)
    return path


def _cut_off(path: Path, size: int) -> bool:
    """Whether a RIFF, AIFF or Ogg file ends early, which their decoders pass over in silence."""
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(max(0, size - 65307))  # the largest Ogg page
        tail = file.read()
    if head[:4] in (b"RIFF", b"FORM"):
        declared = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        unknown = declared >= 0x7FFFFFFF  # written while streaming
        return not unknown and declared + 8 > size + 1  # a last padding byte is often missing
    if head[:4] == b"OggS":
        page = tail[max(0, tail.rfind(b"OggS")) :]
        segments = page[26] if len(page) > 26 else 255
        return len(page) < 27 + segments + sum(page[27 : 27 + segments])
    return False


def _decode(path: Path) -> tuple[np.ndarray, int]:
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return _decode_ffmpeg(path)
    with file:
        try:
            audio = file.read(dtype="float32", always_2d=True).T
        except soundfile.LibsndfileError as error:
            raise DataError(f"{path}: is damaged or cut off ({error})", _CURE) from error
        _check_length(path, audio.shape[1] / file.samplerate, file.frames / file.samplerate)
        return audio, file.samplerate


def _decode_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    with _open(path) as container:
        stream = container.streams.audio[0]
        planar = AudioResampler(format="fltp")
        blocks: list[np.ndarray] = []
        try:
            for frame in container.decode(stream):
                blocks += [block.to_ndarray() for block in planar.resample(frame)]
        except av.error.FFmpegError as error:
            raise DataError(f"{path}: is damaged or cut off ({error.strerror})", _CURE) from error
        rate = stream.rate
        if not rate:
            raise DataError(f"{path}: is not audio, or is damaged (it has no sample rate)", _CURE)
        audio = np.concatenate(blocks, axis=1) if blocks else np.zeros((1, 0), np.float32)
        _check_length(path, audio.shape[1] / rate, _declared_seconds(container) or 0.0)
        return audio, rate


def _open(path: Path) -> InputContainer:
    try:
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS})
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: is not audio, or is damaged or cut off ({error.strerror})", _CURE) from error
    if not container.streams.audio:
        container.close()
        raise DataError(f"{path}: has no audio track", _CURE)
    return container


def _declared_seconds(container: InputContainer) -> float | None:
    if container.format.name == "aac":
        return None  # a bare AAC stream has no header: FFmpeg's figure is a guess from the bit rate
    stream = container.streams.audio[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _check_length(path: Path, decoded: float, declared: float) -> None:
    if decoded < declared - max(0.25, 0.01 * declared):
        raise DataError(f"{path}: is cut off: {decoded:.1f} s of {declared:.1f} s could be read", _CURE)


def _mix(audio: np.ndarray, channels: int) -> np.ndarray:
    present = audio.shape[0]
    if present == channels:
        return audio
    if channels == 1 or present == 1:
        return np.repeat(audio.mean(axis=0, keepdims=True), channels, axis=0)
    if present < channels:
        raise DataError(f"{present} channels cannot become {channels}", "use mono or stereo sound")
    shared = audio[channels:].sum(axis=0, keepdims=True)
    return (audio[:channels] + shared) / (1 + present - channels)

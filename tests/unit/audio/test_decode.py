"""Reading songs: every format, whole or not at all."""

import struct

import av
import numpy as np
import pytest
import soundfile

from trainer.audio.decode import duration, load
from trainer.spec.errors import DataError

RATE = 44_100
CONTAINERS = {
    "wav": ("pcm_s16le", "wav"),
    "aiff": ("pcm_s16be", "aiff"),
    "flac": ("flac", "flac"),
    "mp3": ("libmp3lame", "mp3"),
    "opus": ("libopus", "ogg"),
    "wma": ("wmav2", "asf"),
    "aac": ("aac", "adts"),
    "m4a": ("aac", "ipod"),
    "alac.m4a": ("alac", "ipod"),
}


def tone(seconds=2.0, rate=RATE, channels=2, hz=440.0):
    time = np.arange(int(seconds * rate)) / rate
    return np.repeat(0.3 * np.sin(2 * np.pi * hz * time)[None], channels, axis=0).astype(np.float32)


def write(path, kind, audio, rate=RATE):
    if kind == "ogg":
        soundfile.write(path, audio.T, rate, format="OGG", subtype="VORBIS")
        return path
    codec, container = CONTAINERS[kind]
    out_rate = 48_000 if codec == "libopus" else rate
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=out_rate)
        stream.layout, stream.bit_rate = "stereo", 128_000
        frame = av.AudioFrame.from_ndarray(audio, format="fltp", layout="stereo")
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or None
        resampler = av.AudioResampler(stream.codec_context.format.name, "stereo", out_rate, size)
        for block in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(block))
        file.mux(stream.encode(None))
    return path


def pitch(audio, rate):
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return spectrum.argmax() * rate / len(audio)


@pytest.mark.parametrize("kind", [*CONTAINERS, "ogg"])
def test_every_format_decodes_to_the_same_sound_whatever_its_japanese_name(tmp_path, kind):
    path = write(tmp_path / f"さくら 桜.{kind}", kind, tone())
    audio = load(path, 32_000, 1)
    assert audio.shape[0] == 1 and audio.dtype == np.float32
    assert audio.shape[1] / 32_000 == pytest.approx(2.0, abs=0.06)
    assert duration(path) == pytest.approx(2.0, abs=0.15)
    middle = audio[0, 16_000:48_000]
    assert pitch(middle, 32_000) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("kind", [*CONTAINERS, "ogg"])
def test_every_format_cut_short_is_refused_and_named(tmp_path, kind):
    noise = np.random.default_rng(0).standard_normal((2, 2 * RATE)).astype(np.float32) * 0.1
    path = write(tmp_path / f"歌.{kind}", kind, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    with pytest.raises(DataError, match=r"歌\.[a-z0-9.]+: .*(cut off|damaged)") as error:
        load(path, 16_000, 1)
    assert "leave this file out" in error.value.cure


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty file"),
        ("これは音楽ではありません".encode(), "is not audio"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n", "is not audio"),
        (b"ffconcat version 1.0\nfile other.wav\n", "is not audio"),
        (np.random.default_rng(0).bytes(5000), "is not audio"),
    ],
    ids=["empty", "text", "playlist", "concat", "noise"],
)
def test_a_file_that_is_no_audio_is_refused_and_named(tmp_path, content, problem):
    write(tmp_path / "other.wav", "wav", tone(0.5))
    path = tmp_path / "壊れた曲.wav"
    path.write_bytes(content)
    for read in (duration, lambda path: load(path, 16_000, 1)):
        with pytest.raises(DataError, match=problem) as error:
            read(path)
        assert "壊れた曲.wav" in error.value.problem


def test_a_missing_file_and_a_file_without_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "ない.wav", 16_000, 1)
    soundfile.write(tmp_path / "無.wav", np.zeros((0, 1)), 16_000)
    with pytest.raises(DataError, match="0 samples"):
        load(tmp_path / "無.wav", 16_000, 1)


def test_samples_that_are_not_numbers_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan, 0.1]), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match="not numbers"):
        load(tmp_path / "a.wav", 16_000, 1)


def test_silence_decodes_to_silence(tmp_path):
    soundfile.write(tmp_path / "静か.flac", np.zeros((8000, 2)), 16_000)
    audio = load(tmp_path / "静か.flac", 16_000, 1)
    assert audio.shape == (1, 8000) and not audio.any()


def test_a_wav_written_by_a_stream_with_no_known_length_is_read(tmp_path):
    path = write(tmp_path / "stream.wav", "wav", tone(0.5))
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert load(path, RATE, 2).shape == (2, RATE // 2)


@pytest.mark.parametrize(
    ("levels", "channels", "expected"),
    [
        ([0.2], 2, [0.2, 0.2]),
        ([0.2, 0.4], 1, [0.3]),
        ([0.1, 0.2, 0.4], 2, [0.25, 0.3]),
        ([0.1, 0.2, 0.3, 0.0, 0.4, 0.2], 1, [0.2]),
    ],
)
def test_channels_are_mixed_so_that_none_is_lost_and_none_clips(tmp_path, levels, channels, expected):
    soundfile.write(tmp_path / "a.wav", np.tile(levels, (160, 1)), 16_000, subtype="FLOAT")
    audio = load(tmp_path / "a.wav", 16_000, channels)
    np.testing.assert_allclose(audio[:, 80], expected, atol=1e-6)

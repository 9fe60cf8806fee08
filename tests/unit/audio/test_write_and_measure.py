"""Writing sound, levelling it and measuring it."""

import numpy as np
import pytest
import soundfile

from trainer.audio.decode import load
from trainer.audio.loudness import integrated, normalise
from trainer.audio.measures import measure
from trainer.audio.write import encode, save

RATE = 16_000


def sine(dbfs=-6.0, seconds=2.0, hz=1000.0, channels=1):
    time = np.arange(int(seconds * RATE)) / RATE
    return np.repeat(10 ** (dbfs / 20) * np.sin(2 * np.pi * hz * time)[None], channels, axis=0).astype(np.float32)


@pytest.mark.parametrize(("format", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("mp3", 0.03)])
def test_what_is_written_reads_back(tmp_path, format, tolerance):
    path = tmp_path / f"春.{format}"
    audio = sine(channels=2)
    save(path, audio, RATE, format)
    assert soundfile.info(path).subtype == {"mp3": "MPEG_LAYER_III"}.get(format, "PCM_16")
    back = load(path, RATE, 2)
    assert back.shape == audio.shape
    np.testing.assert_allclose(back[:, 4000:-4000], audio[:, 4000:-4000], atol=tolerance)


def test_encode_gives_the_bytes_that_save_writes_and_clips_instead_of_wrapping(tmp_path):
    audio = sine() * 4
    save(tmp_path / "a.wav", audio, RATE, "wav")
    assert (tmp_path / "a.wav").read_bytes() == encode(audio, RATE, "wav")
    np.testing.assert_allclose(load(tmp_path / "a.wav", RATE, 1), np.clip(audio, -1, 1), atol=1e-4)


def test_a_full_scale_1_khz_sine_has_the_loudness_that_bs1770_states():
    audio = normalise(sine(0.0, seconds=4, hz=997), RATE, -23.0)
    assert integrated(sine(0.0, seconds=4, hz=997), RATE) == pytest.approx(-3.01, abs=0.15)
    assert integrated(audio, RATE) == pytest.approx(-23.0, abs=0.05)


def test_a_clip_shorter_than_a_block_is_as_loud_as_its_long_self():
    assert integrated(sine(seconds=0.1), RATE) == pytest.approx(integrated(sine(seconds=3), RATE), abs=0.3)


@pytest.mark.parametrize("audio", [np.zeros((1, RATE)), np.zeros((2, 0)), np.full((1, RATE), 1e-6)])
def test_silence_has_no_loudness_and_stays_as_it_is(audio):
    assert integrated(audio, RATE) == -np.inf
    assert np.array_equal(normalise(audio, RATE, -14.0), audio)


def test_normalising_never_clips():
    audio = sine(-40.0)
    audio[0, 100] = 0.9
    louder = normalise(audio, RATE, -5.0)
    assert np.abs(louder).max() == pytest.approx(1.0)
    assert integrated(louder, RATE) > integrated(audio, RATE)


def test_measures_of_a_sine_of_6_db_below_full_scale():
    measures = measure(sine(-6.0), RATE, requested_seconds=4.0)
    assert measures["seconds"] == 2.0
    assert measures["duration_reached"] == 0.5
    assert measures["peak_dbfs"] == pytest.approx(-6.0, abs=0.01)
    assert measures["loudness_lufs"] == pytest.approx(-9.0, abs=0.3)
    assert measures["silence_ratio"] == measures["longest_silence_seconds"] == measures["clipping_ratio"] == 0.0
    assert measures["dc_offset"] == pytest.approx(0.0, abs=1e-4)


def test_measures_find_the_silent_half_and_its_longest_gap():
    audio = sine(-6.0, seconds=4.0)
    audio[:, RATE : 2 * RATE + RATE // 2] = 0.0
    audio[:, 3 * RATE : 3 * RATE + RATE // 2] = 0.0
    measures = measure(audio, RATE)
    assert measures["silence_ratio"] == pytest.approx(0.5)
    assert measures["longest_silence_seconds"] == pytest.approx(1.5)
    assert "duration_reached" not in measures


def test_measures_find_clipping_in_any_channel_and_a_dc_offset():
    audio = np.concatenate([np.clip(sine(6.0, hz=997), -1, 1), sine(-20.0)])
    assert measure(audio, RATE)["clipping_ratio"] == pytest.approx(2 / 3, abs=0.02)
    assert measure(sine(-20.0) - 0.25, RATE)["dc_offset"] == pytest.approx(-0.25, abs=1e-3)


@pytest.mark.parametrize(
    "audio",
    [np.zeros((1, RATE)), np.zeros((2, 0)), np.zeros((1, 3)), np.full((1, RATE), np.nan), np.full((2, 50), np.inf)],
    ids=["silent", "empty", "3 samples", "nan", "inf"],
)
def test_every_measure_is_finite_whatever_the_sound(audio):
    measures = measure(audio, RATE, requested_seconds=1.0)
    assert all(np.isfinite(value) for value in measures.values())
    assert -70.0 <= measures["loudness_lufs"] < 20

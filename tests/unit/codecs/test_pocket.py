"""The pocket codec: exact transform, audible codes, silent silence."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.codecs.pocket import BUILTIN, PocketCodec, inverse_mdct, main, mdct
from trainer.data.demo.songs import STYLE_A, STYLE_B, compose
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.errors import DataError
from trainer.spec.model import Codec


@pytest.fixture(scope="module")
def codec():
    return open_codec(MusicGen(family="musicgen", pretrained="builtin:pocket"))


def model_with(url):
    return MusicGen(family="musicgen", pretrained="builtin:pocket", codec=Codec(weights={"codebooks": url}))


def snr(audio, back):
    rest = audio - back[:, : audio.shape[1]]
    return 10 * np.log10(np.square(audio).sum() / np.square(rest).sum())


def noise(samples):
    return np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 321, 640, 16_000, 50_001])
def test_the_mdct_gives_back_every_sample(samples):
    audio = noise(samples)
    coefficients = mdct(audio)
    back = inverse_mdct(coefficients)
    assert coefficients.shape == (-(-samples // 320), 320)
    np.testing.assert_allclose(back[:samples], audio, atol=1e-6)
    np.testing.assert_allclose(back[samples:], 0, atol=1e-6)


def test_the_mdct_keeps_energy_and_is_the_windowed_cosine_sum_of_its_definition():
    audio = noise(3200)
    coefficients = mdct(audio)
    assert np.square(coefficients).sum() == pytest.approx(np.square(audio).sum(), rel=1e-5)
    n, k = np.arange(640), np.arange(320)
    window = np.sin(np.pi / 640 * (n + 0.5))
    cosines = np.cos(np.pi / 320 * (n[:, None] + 0.5 - 160) * (k + 0.5))
    expected = np.sqrt(2 / 320) * (audio[5 * 320 - 160 : 5 * 320 + 480] * window) @ cosines
    np.testing.assert_allclose(coefficients[5], expected, atol=1e-4)


@pytest.mark.parametrize(("style", "least"), [(STYLE_A, 20), (STYLE_B, 18)])
def test_a_demo_song_survives_and_more_codes_mean_a_better_sound(codec, style, least):
    audio = compose(style, 0).audio.astype(np.float32)
    codes = codec.encode(audio)["codes"]
    ratios = [snr(audio, codec.decode({"codes": codes[: k + 1]})) for k in range(4)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > least
    assert codes.shape == (4, round(audio.shape[1] / 16_000 * codec.frame_rate))


@pytest.mark.parametrize(("style", "least"), [(STYLE_A, 13), (STYLE_B, 14)])
def test_songs_that_the_codebooks_never_saw_survive_too(codec, style, least):
    audio = compose(style, 3, seed=77).audio.astype(np.float32)
    assert snr(audio, codec.decode(codec.encode(audio))) > least


def test_silence_stays_silent(codec):
    codes = codec.encode(np.zeros((1, 16_000), np.float32))["codes"]
    assert not codes.any()
    assert not codec.decode({"codes": codes}).any()


def test_codes_stay_in_the_vocabulary_whatever_the_sound(codec):
    for audio in (noise(16_000)[None], np.ones((1, 700), np.float32), np.zeros((1, 0), np.float32)):
        codes = codec.encode(audio)["codes"]
        assert codes.shape == (4, -(-audio.shape[1] // 320))
        assert np.issubdtype(codes.dtype, np.integer)
        assert codec.decode({"codes": codes}).shape == (1, 320 * codes.shape[1])
        assert ((codes >= 0) & (codes < codec.vocabulary)).all()


def test_encoding_is_deterministic_and_does_not_touch_its_input(codec):
    audio = noise(5_000)[None]
    before = audio.copy()
    assert np.array_equal(codec.encode(audio)["codes"], codec.encode(audio)["codes"])
    assert np.array_equal(audio, before)


def test_a_long_song_has_the_codes_of_its_parts(codec):
    beat = compose(STYLE_B, 1).audio[:, : 320 * 96].astype(np.float32)
    long = codec.encode(np.tile(beat, (1, 50)))["codes"]
    assert long.shape[1] > 4096
    middle = long[:, 96 * 44 : 96 * 45]
    assert np.mean(middle == long[:, 96:192]) > 0.999


@pytest.mark.parametrize("codes", [np.full((4, 3), 256), np.full((4, 3), -1), np.zeros((5, 3), np.int64)])
def test_codes_of_another_codec_are_refused(codec, codes):
    with pytest.raises(DataError, match="not the pocket codec's") as error:
        codec.decode({"codes": codes})
    assert "decode them with the codec" in error.value.cure


def test_the_fingerprint_is_that_of_the_codebooks(codec, tmp_path):
    books = load_file(BUILTIN)["codebooks"]
    assert codec.fingerprint == hashlib.sha256(books.tobytes()).hexdigest()[:16]
    path = tmp_path / "符号帳.safetensors"
    save_file({"codebooks": books}, path)
    assert open_codec(model_with(f"file://{path}")).fingerprint == codec.fingerprint
    books[0, 1, 0] += 1
    save_file({"codebooks": books}, path)
    assert PocketCodec.open(model_with(f"file://{path}")).fingerprint != codec.fingerprint


def test_unusable_codebooks_are_refused_and_named(tmp_path):
    path = tmp_path / "壊.safetensors"
    with pytest.raises(DataError, match=r"壊\.safetensors: no such codebooks"):
        PocketCodec.open(model_with(f"file://{path}"))
    path.write_bytes(b"\x08")
    with pytest.raises(DataError, match="no safetensors file"):
        PocketCodec.open(model_with(f"file://{path}"))
    save_file({"codebooks": np.zeros((2, 256, 320), np.float16)}, path)
    with pytest.raises(DataError, match="holds no codebooks"):
        PocketCodec.open(model_with(f"file://{path}"))
    with pytest.raises(DataError, match="not on this machine"):
        PocketCodec.open(model_with("s3://models/codec.safetensors"))


def test_codebooks_learned_from_a_song_play_that_song_the_same_each_time(tmp_path):
    song = compose(STYLE_A, 0).audio[:, : 320 * 300]
    (tmp_path / "歌").mkdir()
    save(tmp_path / "歌" / "一.wav", song, 16_000, "wav")
    for out in ("1.safetensors", "2.safetensors"):
        assert main([str(tmp_path / "歌"), str(tmp_path / out)]) == 0
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    codec = PocketCodec.open(model_with(f"file://{tmp_path / '1.safetensors'}"))
    audio = song.astype(np.float32)
    assert snr(audio, codec.decode(codec.encode(audio))) > 30
    assert not codec.decode(codec.encode(np.zeros_like(audio))).any()


def test_learning_from_a_folder_without_songs_says_so(tmp_path, caplog):
    assert main([str(tmp_path), str(tmp_path / "out.safetensors")]) == DataError.exit_code
    assert "holds no songs" in caplog.text

"""The demo songs: music, the same everywhere, in two styles."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from trainer.audio.decode import load
from trainer.audio.measures import measure
from trainer.data.demo import write_songs
from trainer.data.demo.songs import STYLE_A, STYLE_B, compose, vowels

SHA256 = {
    "style-a/song-01.wav": "b6466a7a1b0c60e9cbd940096be43451b2260113d1069368e69bc3e6aaf6d367",
    "style-b/song-01.wav": "c1f2f6abbba9bbecb16bee57befcffe42a1cb5dad6b6baba33543a5bc42a719f",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("歌")
    write_songs(folder)
    return folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", SHA256)
def test_the_same_seed_gives_the_same_bytes_as_ever(folder, name):
    assert digest(folder / name) == SHA256[name]


def test_the_command_line_writes_the_same_songs_in_another_process(folder, tmp_path):
    command = [sys.executable, "-m", "trainer.data.demo", str(tmp_path / "曲"), "--songs", "2", "--style", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "song 2 of 2" in done.stderr
    for name in ("song-01", "song-02"):
        for suffix in (".wav", ".txt", ".lyrics"):
            written = (tmp_path / "曲" / "style-b" / (name + suffix)).read_bytes()
            assert written == (folder / "style-b" / (name + suffix)).read_bytes()
    assert not (tmp_path / "曲" / "style-a").exists()


def test_twelve_songs_are_six_of_each_style_with_tags_and_lyrics(folder):
    for style in ("style-a", "style-b"):
        songs = sorted((folder / style).glob("*.wav"))
        assert len(songs) == 6
        for song in songs:
            assert "歌声" in song.with_suffix(".txt").read_text(encoding="utf-8")
            lyrics = song.with_suffix(".lyrics").read_text(encoding="utf-8")
            assert lyrics.startswith("[verse]\n") and "\n[chorus]\n" in lyrics
            assert vowels(lyrics.replace("[verse]", "").replace("[chorus]", ""))


def test_every_song_is_whole_clean_and_as_loud_as_the_others(folder):
    for path in folder.glob("*/*.wav"):
        measures = measure(load(path, 16_000, 1), 16_000)
        assert 10 <= measures["seconds"] <= 20
        assert measures["loudness_lufs"] == pytest.approx(-18.0, abs=0.1)
        assert measures["peak_dbfs"] < -0.5
        assert measures["silence_ratio"] == measures["clipping_ratio"] == 0.0
        assert abs(measures["dc_offset"]) < 0.005


def test_no_two_songs_are_the_same_and_seeds_differ(folder):
    digests = {digest(path) for path in folder.glob("*/*.wav")}
    assert len(digests) == 12
    assert not np.array_equal(compose(STYLE_A, 0, seed=0).audio, compose(STYLE_A, 0, seed=1).audio)


def test_a_song_does_not_depend_on_how_many_are_written(folder, tmp_path):
    write_songs(tmp_path, songs=3)
    for path in tmp_path.glob("*/*"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_style_b_is_the_brighter_of_the_two():
    def share_above_2_khz(song):
        power = np.square(np.abs(np.fft.rfft(song.audio[0])))
        return power[len(power) // 4 :].sum() / power.sum()

    darkest_b = min(share_above_2_khz(compose(STYLE_B, number)) for number in range(3))
    brightest_a = max(share_above_2_khz(compose(STYLE_A, number)) for number in range(3))
    assert darkest_b > 1.5 * brightest_a


@pytest.mark.parametrize(
    ("text", "sung"),
    [
        ("さくら さくら", "auaaua"),
        ("わっしょい", "a.oi"),
        ("ふうりん", "uuin"),
        ("キャンディー", "anii"),
        ("[verse] 桜 a", ""),
    ],
)
def test_kana_are_sung_by_their_vowels(text, sung):
    assert vowels(text) == sung

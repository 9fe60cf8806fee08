import os
from pathlib import Path

import numpy as np
import pytest

from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.dataset import Failure, newest
from trainer.data.prepare import Tools, prepare_songs
from trainer.families import open_family
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.data import Prepare
from trainer.spec.errors import DataError

MODEL = MusicGen(family="musicgen", pretrained="random:tiny")
RATE = 16000


def tone(seconds: float, level: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE))[None].astype(np.float32)


@pytest.fixture
def songs(tmp_path) -> Path:
    folder = tmp_path / "歌"
    folder.mkdir()
    for i in range(3):
        save(folder / f"さくら{i}.wav", tone(1.5 + i, hz=220 * (i + 1)), RATE, "wav")
        (folder / f"さくら{i}.txt").write_text("琴, 明るい", encoding="utf-8")
    return folder


@pytest.fixture
def spoilt(songs) -> Path:
    """The same with files that cannot be used."""
    save(songs / "無音.wav", tone(2, level=0), RATE, "wav")
    save(songs / "短い.wav", tone(0.3), RATE, "wav")
    save(songs / "切れた.wav", tone(3), RATE, "wav")
    os.truncate(songs / "切れた.wav", 40_000)
    (songs / "空.mp3").write_bytes(b"")
    (songs / "文.flac").write_text("これは音ではない", encoding="utf-8")
    return songs


def tools(folder: Path, **options) -> Tools:
    spec = Prepare.model_validate({"source": {"type": "folder", "path": str(folder)}, "shard_songs": 2, **options})
    return Tools(spec, open_codec(MODEL), open_family(MODEL), "musicgen")


def test_songs_become_a_dataset_that_sounds_like_them(songs, url):
    ready = tools(songs)
    told = []
    dataset = prepare_songs(url, ready, lambda *news: told.append(news))
    assert told == [(1, 3, "さくら0.wav", None), (2, 3, "さくら1.wav", None), (3, 3, "さくら2.wav", None)]
    assert dataset.songs.seconds == [1.5, 2.5, 3.5]
    assert len(set(dataset.songs.shards)) == 2
    song = dataset.song("さくら1")
    assert (song.tags, song.lyrics, song.source) == ("琴, 明るい", "", "さくら1.wav")
    assert song.arrays["text_hidden"].shape[1] == 64
    np.testing.assert_array_equal(song.arrays["codes"], ready.codec.encode(tone(2.5, hz=440))["codes"])
    dataset.check_against(codebooks=4, vocabulary=256, frame_rate=50, fingerprint=ready.codec.fingerprint)


def test_songs_that_cannot_be_used_are_left_out_by_name_and_reason(spoilt, url):
    prepare_songs(url, tools(spoilt))
    reasons = {failure.name: failure.reason for failure in newest(url).failures}
    assert len(newest(url).songs) == 3
    assert reasons["無音.wav"] == "is silent: its loudest moment is -inf dBFS, data.prepare.silence is -60"
    assert reasons["短い.wav"] == "is too short: 0.3 s, data.prepare.min_seconds is 1"
    assert "cut off" in reasons["切れた.wav"]
    assert reasons["空.mp3"] == "is an empty file (0 bytes)"
    assert "is not audio" in reasons["文.flac"]
    assert len(reasons) == 5


def test_progress_tells_of_failures_too(spoilt, url):
    told = []
    prepare_songs(url, tools(spoilt), lambda *news: told.append(news))
    assert [done for done, *_ in told] == list(range(1, 9))
    assert {total for _, total, *_ in told} == {8}
    assert sum(isinstance(failure, Failure) for *_, failure in told) == 5


def test_nothing_is_done_again_until_an_input_changes(songs, url):
    assert prepare_songs(url, tools(songs)).version == 1
    told = []
    assert prepare_songs(url, tools(songs), lambda *news: told.append(news)).version == 1
    assert told == []
    (songs / "さくら0.txt").write_text("太鼓", encoding="utf-8")
    assert prepare_songs(url, tools(songs)).version == 2
    assert prepare_songs(url, tools(songs, loudness=-23)).version == 3
    assert prepare_songs(url, tools(songs, loudness=-23)).version == 3


def test_the_same_songs_prepared_twice_are_equal(songs, url, tmp_path):
    assert prepare_songs(url, tools(songs)).digest == prepare_songs(f"file://{tmp_path}/別", tools(songs)).digest


def test_loudness_is_levelled_before_encoding(songs, url, tmp_path):
    quiet = prepare_songs(url, tools(songs, loudness=-40))
    loud = prepare_songs(f"file://{tmp_path}/別", tools(songs, loudness=-14))
    decode = open_codec(MODEL).decode
    levels = [np.abs(decode(d.song("さくら2").arrays)).max() for d in (quiet, loud)]
    assert levels[0] < 0.2 * levels[1]


def test_songs_too_long_are_left_out(songs, url):
    dataset = prepare_songs(url, tools(songs, max_seconds=3))
    assert dataset.failures == [Failure("さくら2.wav", "is too long: 3.5 s, data.prepare.max_seconds is 3")]


def test_an_empty_folder_is_an_error(tmp_path, url):
    (tmp_path / "空").mkdir()
    with pytest.raises(DataError, match="空: holds no songs"):
        prepare_songs(url, tools(tmp_path / "空"))
    assert newest(url) is None


def test_when_no_song_can_be_used_the_first_ten_are_named(tmp_path, url):
    folder = tmp_path / "歌"
    folder.mkdir()
    for i in range(12):
        (folder / f"壊れ{i:02}.wav").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 12 songs can be used") as caught:
        prepare_songs(url, tools(folder))
    assert "壊れ09.wav: is an empty file" in caught.value.problem
    assert "壊れ10" not in caught.value.problem
    assert "and 2 more" in caught.value.problem
    assert newest(url) is None


def test_the_demo_prepares_itself(url):
    spec = Prepare.model_validate({"source": {"type": "demo", "style": "b", "songs": 2}})
    dataset = prepare_songs(url, Tools(spec, open_codec(MODEL), open_family(MODEL), "musicgen"))
    assert dataset.songs.groups == ["style-b", "style-b"]
    assert "祭り" in dataset.song(dataset.songs.ids[0]).tags


def test_codes_beside_a_song_are_taken_as_they_are(songs, url):
    codes = np.random.default_rng(0).integers(0, 256, (4, 80))
    np.save(songs / "さくら0.tokens.npy", codes)
    np.save(songs / "さくら1.tokens.npy", codes.T)
    np.save(songs / "さくら2.tokens.npy", codes + 1)
    dataset = prepare_songs(url, tools(songs))
    assert dataset.songs.seconds == [1.6, 1.6]
    for song in ("さくら0", "さくら1"):
        np.testing.assert_array_equal(dataset.song(song).arrays["codes"], codes)
    (failure,) = dataset.failures
    assert failure.name == "さくら2.wav"
    assert failure.reason == "the codes given with it are 1 to 256, codec pocket has 0 to 255"


def test_codes_of_another_codec_are_refused(songs, url):
    for i in range(3):
        np.save(songs / f"さくら{i}.tokens.npy", np.zeros((8, 40), np.int64))
    with pytest.raises(
        DataError,
        match=r"さくら0.wav: the codes given with it are int64 \[8, 40\], codec pocket makes integers \[4, T\]",
    ):
        prepare_songs(url, tools(songs))


def test_songs_of_given_codes_may_be_too_short_or_too_long(songs, url):
    for i, frames in enumerate((49, 50, 151)):
        np.save(songs / f"さくら{i}.tokens.npy", np.zeros((4, frames), np.int64))
    dataset = prepare_songs(url, tools(songs, max_seconds=3))
    assert dataset.songs.ids == ["さくら1"]
    assert dataset.failures == [
        Failure("さくら0.wav", "is too short: 1.0 s, data.prepare.min_seconds is 1"),
        Failure("さくら2.wav", "is too long: 3.0 s, data.prepare.max_seconds is 3"),
    ]


def test_what_is_no_array_of_codes_is_told(songs, url):
    (songs / "さくら0.tokens.npy").write_text("これは配列ではない", encoding="utf-8")
    (failure,) = prepare_songs(url, tools(songs)).failures
    assert failure.name == "さくら0.wav"
    assert failure.reason.startswith("さくら0.tokens.npy is no array of codes")


def test_a_song_whose_texts_the_family_cannot_use_is_left_out(songs, url, monkeypatch):
    ready = tools(songs)
    plain = ready.family.conditions

    def picky(texts):
        if any("尺八" in text["tags"] for text in texts):
            raise DataError("知らない楽器: 尺八")
        return plain(texts)

    monkeypatch.setattr(ready.family, "conditions", picky)
    (songs / "さくら1.txt").write_text("尺八", encoding="utf-8")
    dataset = prepare_songs(url, ready)
    assert dataset.songs.ids == ["さくら0", "さくら2"]
    assert dataset.failures == [Failure("さくら1.wav", "知らない楽器: 尺八")]


def test_a_limit_takes_the_first_songs_only(songs, url):
    assert sorted(prepare_songs(url, tools(songs, limit=2)).songs.ids) == ["さくら0", "さくら1"]

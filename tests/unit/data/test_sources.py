import json

import numpy as np
import pytest

from trainer.data.dataset import Failure
from trainer.data.sources import SourceSong, open_source
from trainer.data.sources.base import AUDIO_SUFFIXES
from trainer.spec.data import FolderSource, JaCappellaSource, JsonlSource, SpeakersSource
from trainer.spec.errors import DataError


@pytest.fixture
def place(tmp_path):
    """Writes a file by its path below ``tmp_path``."""

    def write(path: str, content: str | bytes = b"") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def folder(tmp_path, **options) -> list[SourceSong | Failure]:
    return open_source(FolderSource(type="folder", path=str(tmp_path), **options)).songs()


def test_a_folder_gives_songs_with_their_texts(tmp_path, place):
    place("歌手/さくら.wav")
    place("歌手/さくら.txt", "明るい, 琴\n")
    place("歌手/さくら.lyrics", "[verse]\nさくら さくら\n")
    place("ひとり.MP3")
    place(".trash/x.wav")
    place("歌手/._さくら.wav")
    place("表紙.jpg")
    assert folder(tmp_path) == [
        SourceSong("ひとり", "ひとり", "ひとり.MP3", "", ""),
        SourceSong("歌手/さくら", "歌手", "歌手/さくら.wav", "明るい, 琴", "[verse]\nさくら さくら"),
    ]


def test_every_kind_of_audio_is_found(tmp_path, place):
    for suffix in AUDIO_SUFFIXES:
        place(f"歌-{suffix[1:]}{suffix}")
    assert len(folder(tmp_path)) == len(AUDIO_SUFFIXES) == 12


def test_file_name_patterns_are_followed(tmp_path, place):
    place("a/歌.wav")
    place("a/歌_lyrics.txt", "[instrumental]")
    assert folder(tmp_path, lyrics_filename="{stem}_lyrics.txt")[0].lyrics == "[instrumental]"
    (failure,) = folder(tmp_path, tags_filename="../{stem}.txt")
    assert "leads out of the song's folder" in failure.reason


def test_texts_may_have_a_byte_order_mark_but_must_be_utf_8(tmp_path, place):
    place("a.wav")
    place("a.txt", "祭り".encode("utf-8-sig"))
    place("b.wav")
    place("b.lyrics", "さくら".encode("shift-jis"))
    good, bad = folder(tmp_path)
    assert good.tags == "祭り"
    assert bad == Failure("b.wav", "b.lyrics is not UTF-8 text (byte 1)")


def test_two_songs_of_one_name_are_not_mixed_up(tmp_path, place):
    place("歌.flac")
    place("歌.wav")
    good, twin = folder(tmp_path)
    assert good.audio == "歌.flac"
    assert twin == Failure("歌.wav", "has the same name as 歌.flac")


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(DataError, match=r"無い is not a folder\n.*data\.prepare\.source\.path"):
        folder(tmp_path / "無い")


def test_inputs_change_with_any_file(tmp_path, place):
    place("歌.wav", b"1")
    source = FolderSource(type="folder", path=str(tmp_path))
    before = open_source(source).inputs()
    assert open_source(source).inputs() == before
    place("歌.txt", "新しい")
    assert open_source(source).inputs() != before


def test_jsonl_lines_become_songs_or_named_failures(tmp_path, place):
    place("甲/1.wav")
    place("2.flac")
    lines = [
        json.dumps({"path": "甲/1.wav", "description": "琴", "lyrics": "さくら", "duration": 3.0}, ensure_ascii=False),
        json.dumps({"path": "2.flac", "tags": ["速い", "祭り"], "group": "乙"}),
        "",
        "{not json",
        "[1]",
        json.dumps({"tags": "歌"}),
        json.dumps({"path": "../外.wav"}),
        json.dumps({"path": "/etc/passwd"}),
        json.dumps({"path": "無い.wav"}, ensure_ascii=False),
        json.dumps({"path": "metadata.jsonl"}),
    ]
    place("metadata.jsonl", "\n".join(lines).encode("utf-8-sig"))
    found = open_source(JsonlSource(type="jsonl", path=f"{tmp_path}/metadata.jsonl")).songs()
    assert found[:2] == [
        SourceSong("甲/1", "甲", "甲/1.wav", "琴", "さくら"),
        SourceSong("2", "乙", "2.flac", "速い, 祭り", ""),
    ]
    assert {failure.name: failure.reason.split(" (")[0] for failure in found[2:]} == {
        "metadata.jsonl:4": "is not JSON",
        "metadata.jsonl:5": "is not a JSON object",
        "metadata.jsonl:6": "has no 'path'",
        "metadata.jsonl:7": "../外.wav leads out of the folder of metadata.jsonl; write a path inside it",
        "metadata.jsonl:8": "/etc/passwd leads out of the folder of metadata.jsonl; write a path inside it",
        "metadata.jsonl:9": "無い.wav does not exist",
        "metadata.jsonl:10": "metadata.jsonl has no ending of an audio file",
    }


def test_jsonl_columns_can_be_renamed_and_the_path_be_relative(tmp_path, place, monkeypatch):
    place("歌.wav")
    place("m.jsonl", json.dumps({"file": "歌.wav", "caption": "琴", "norm_lyrics": "さくら"}))
    monkeypatch.chdir(tmp_path)
    columns = {"path": "file", "tags": "caption", "lyrics": "norm_lyrics"}
    (song,) = open_source(JsonlSource(type="jsonl", path="m.jsonl", columns=columns)).songs()
    assert (song.tags, song.lyrics) == ("琴", "さくら")


def test_a_missing_jsonl_is_said(tmp_path):
    with pytest.raises(DataError, match=r"m\.jsonl does not exist"):
        open_source(JsonlSource(type="jsonl", path=f"{tmp_path}/m.jsonl")).songs()


def test_speakers_are_groups_and_need_transcripts(tmp_path, place):
    place("花子/一.wav")
    place("花子/一.lab", "こんにちは")
    place("太郎/二.mp3")
    place("stray.wav")
    source = open_source(SpeakersSource(type="speakers", path=str(tmp_path)))
    assert source.songs() == [
        Failure("太郎/二.mp3", "has no transcript 二.lab"),
        SourceSong("花子/一", "花子", "花子/一.wav", "", "こんにちは"),
    ]


def test_codes_of_a_speakers_recording_lie_beside_it(tmp_path, place):
    place("花子/一.wav")
    place("花子/一.lab", "こんにちは")
    place("花子/二.wav")
    place("花子/二.lab", "さようなら")
    np.save(tmp_path / "花子" / "一.npy", np.arange(16).reshape(8, 2))
    source = open_source(SpeakersSource(type="speakers", path=str(tmp_path)))
    first, second = source.songs()
    assert source.codes(first).tolist() == np.arange(16).reshape(8, 2).tolist()
    assert source.codes(second) is None


def test_a_source_of_a_later_day_is_refused_by_name():
    with pytest.raises(DataError, match="type jacappella is not available yet"):
        open_source(JaCappellaSource(type="jacappella", path="歌"))

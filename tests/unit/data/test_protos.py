"""fish-speech's packed recordings, read and prepared."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.codecs import open_codec
from trainer.data.dataset import Failure
from trainer.data.prepare import Tools, prepare_songs
from trainer.data.sources import SourceSong, open_source
from trainer.families import open_family
from trainer.families.fish_speech.protos import read_protos
from trainer.families.fish_speech.spec import FishSpeech
from trainer.spec.data import Prepare, ProtosSource
from trainer.spec.errors import DataError

TEXT = "さくら さくら, 野山も里も"
GOLDEN = Path(__file__).parents[2] / "golden" / "cases" / "fish_speech" / "protos"


def message(field: int, content: bytes) -> bytes:
    assert len(content) < 1 << 14
    size = len(content)
    return bytes([field << 3 | 2]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content


def sentence(text: str, codes: np.ndarray) -> bytes:
    """Codes below 128, packed."""
    books = b"".join(message(3, message(1, bytes(book))) for book in codes.tolist())
    return message(4, (message(1, text.encode()) if text else b"") + books)


def packed(*groups: bytes) -> bytes:
    return b"".join(len(group).to_bytes(4, "little") + group for group in groups)


def test_what_upstream_has_packed_is_read() -> None:
    groups = [
        {
            "source": group.source,
            "name": group.name,
            "sentences": [{"texts": one.texts, "semantics": one.codes.tolist()} for one in group.sentences],
        }
        for group in read_protos(GOLDEN / "00000000.protos")
    ]
    assert groups == json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["groups"]


def test_numbers_may_be_packed_or_not_and_damage_is_told(tmp_path: Path) -> None:
    codes = message(3, message(1, bytes([5, 0xE7, 7]))) + message(3, b"\x08\x06\x08\x01")
    group = message(2, "花子".encode()) + message(4, message(1, TEXT.encode()) + codes) + b"\x4d\0\0\0\0"
    file = tmp_path / "00000000.protos"
    file.write_bytes(packed(group, group))
    first, second = read_protos(file)
    assert first.name == second.name == "花子" and first.source == ""
    assert first.sentences[0].texts == [TEXT]
    assert first.sentences[0].codes.tolist() == [[5, 999], [6, 1]]
    too_large = packed(message(4, message(3, message(1, b"\xff\xff\x7f"))))
    for damaged in (packed(group)[:-1], packed(group)[:3], packed(b"\x0b"), too_large):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is no \.protos file, or damaged"):
            list(read_protos(file))


def test_recordings_are_songs_of_their_speaker_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    codes = np.arange(16).reshape(8, 2)
    hanako = message(2, "花子".encode()) + sentence(f" {TEXT} ", codes) + sentence("", codes)
    (tmp_path / "下").mkdir()
    (tmp_path / "下" / "00000000.protos").write_bytes(packed(hanako, sentence("歌", codes + 1)))
    (tmp_path / "00000001.protos").write_bytes(packed(hanako)[:-1])
    source = open_source(ProtosSource(type="protos", path=str(tmp_path)))
    damaged, first, silent, last = source.songs()
    assert isinstance(damaged, Failure)
    assert (damaged.name, damaged.reason.split(":")[0]) == ("00000001.protos", "is no .protos file, or damaged")
    assert first == SourceSong("下/00000000/1", "花子", "下/00000000.protos:1", "", TEXT)
    assert silent == Failure("下/00000000.protos:2", "has no transcript")
    assert last == SourceSong("下/00000000/3", "下/00000000", "下/00000000.protos:3", "", "歌")
    assert source.codes(last).tolist() == (codes + 1).tolist()


def test_packed_recordings_become_a_dataset_without_any_audio(tmp_path: Path, url: str) -> None:
    codes = np.random.default_rng(0).integers(0, 128, (8, 40))
    group = message(2, "花子".encode()) + sentence(TEXT, codes) + sentence("短い", codes[:, :5])
    (tmp_path / "梱包").mkdir()
    (tmp_path / "梱包" / "00000000.protos").write_bytes(packed(group))
    model = FishSpeech(family="fish_speech", pretrained="random:tiny")
    spec = Prepare.model_validate({"source": {"type": "protos", "path": str(tmp_path / "梱包")}})
    dataset = prepare_songs(url, Tools(spec, open_codec(model), open_family(model), "fish_speech"))
    song = dataset.song("00000000/1")
    assert (song.group, song.lyrics, song.frames) == ("花子", TEXT, 40)
    assert song.seconds == pytest.approx(40 * 2048 / 44_100)
    np.testing.assert_array_equal(song.arrays["codes"], codes)
    assert dataset.failures == [Failure("00000000.protos:2", "is too short: 0.2 s, data.prepare.min_seconds is 1")]

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.data.conftest import FORMAT, make_song, write
from trainer.data.dataset import Dataset, Writer, split
from trainer.data.shards import ShardFormat
from trainer.spec.data import HeldOut
from trainer.spec.errors import DataError, StoreError
from trainer.store import open_store

SONGS = [make_song(f"歌{i}", frames=10 + i, group=f"歌手{i // 4}") for i in range(20)]


def test_a_version_is_opened_with_its_songs(url):
    write(url, SONGS[:7])
    dataset = Dataset.open(url)
    assert dataset.version == 1
    assert dataset.songs.ids == [f"歌{i}" for i in range(7)]
    assert dataset.songs.frames == [10 + i for i in range(7)]
    assert dataset.seconds == pytest.approx(sum(song.seconds for song in SONGS[:7]))
    for song in SONGS[:7]:
        np.testing.assert_array_equal(dataset.song(song.id).arrays["codes"], song.arrays["codes"])


def test_the_digest_names_the_content(url, tmp_path):
    first, grown = write(url, SONGS[:7]), write(url, SONGS)
    assert write(f"file://{tmp_path}/別", SONGS[:7]).digest == first.digest != grown.digest
    assert grown.pin == {"url": url, "version": 2, "digest": grown.digest}


def test_old_versions_stay_readable(url):
    write(url, SONGS[:7])
    write(url, SONGS)
    assert len(Dataset.open(url).songs) == 20
    assert len(Dataset.open(url, version=1).songs) == 7


def test_publishers_at_once_make_whole_versions_all(url):
    parts = [SONGS[i : i + 5] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda songs: write(url, songs), parts))
    assert sorted(dataset.version for dataset in published) == list(range(1, 9))
    for songs, dataset in zip(parts, published, strict=True):
        opened = Dataset.open(url, dataset.version)
        assert opened.songs.ids == [song.id for song in songs]
        assert [opened.song(song.id).lyrics for song in songs] == [song.lyrics for song in songs]


def test_what_is_not_there_is_said(url):
    with pytest.raises(DataError, match="資料 holds no dataset"):
        Dataset.open(url)
    write(url, SONGS)
    with pytest.raises(DataError, match=r"has no version 7\n.*it has 1"):
        Dataset.open(url, version=7)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_named_before_a_song_comes_out_of_it(url, damage):
    dataset = write(url, SONGS)
    path = dataset.store.local / dataset.songs.shards[0]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(StoreError, match=rf"{path.name} is missing or damaged"):
        Dataset.open(url).song("歌0")


def test_a_dataset_that_fits_the_model_passes(url):
    write(url, SONGS).check_against(codebooks=4, vocabulary=256, frame_rate=50, fingerprint="0123456789abcdef")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"vocabulary": 129}, r"song 歌0 in shards/[0-9a-f]{16}\.parquet holds code \d+, the model knows 0 to 128"),
        ({"vocabulary": 16384}, "prepared with vocabulary 256, the model expects 16384"),
        ({"codebooks": 8}, "prepared with codebooks 4, the model expects 8"),
        ({"frame_rate": 12.5}, "prepared with frame rate 50.0, the model expects 12.5"),
        ({"fingerprint": "fedc"}, "prepared with codec fingerprint 0123456789abcdef, the model expects fedc"),
    ],
)
def test_a_dataset_for_another_model_is_refused(url, expected, message):
    with pytest.raises(DataError, match=message):
        write(url, SONGS).check_against(**{"codebooks": 4, "vocabulary": 256, "frame_rate": 50.0, **expected})


def test_latents_of_another_shape_are_refused(url):
    song = replace(make_song("歌"), arrays={"latents": np.zeros((4, 20), np.float16)})
    told = {"codebooks": 0, "vocabulary": 0, "timed": ("latents",), "dtypes": {"latents": "float16"}}
    format = replace(FORMAT, **told, latent_shape=(4,))
    with pytest.raises(DataError, match=r"song 歌: latents have shape \[4, 20\], the codec makes \[8, 16, T\]"):
        Writer(open_store(url), replace(format, latent_shape=(8, 16))).add([song])
    writer = Writer(open_store(url), format)
    writer.add([song])
    dataset = writer.commit()
    wanted = {"codebooks": 0, "vocabulary": 0, "frame_rate": 50.0}
    dataset.check_against(**wanted, latent_shape=(4,))
    with pytest.raises(DataError, match=r"prepared with latents \[4, T\], the model expects \[8, 16, T\]"):
        dataset.check_against(**wanted, latent_shape=(8, 16))


def test_datasets_that_do_not_tell_the_shape_of_their_latents_are_still_read(url):
    told = write(url, SONGS[:1]).format.to_dict()
    del told["latent_shape"]
    assert ShardFormat.from_dict(told) == FORMAT


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.99])
def test_groups_are_held_out_whole_and_no_side_is_empty(url, fraction):
    dataset = write(url, SONGS)
    groups = dict(zip(dataset.songs.ids, dataset.songs.groups, strict=True))
    for seed in range(5):
        (train,), (held,) = split([dataset], HeldOut(fraction=fraction), seed)
        assert sorted(train + held) == sorted(groups)
        assert train
        assert held
        assert {groups[song] for song in train}.isdisjoint(groups[song] for song in held)
        assert abs(len(held) - fraction * 20) <= 4


def test_a_singer_is_on_one_side_in_all_datasets(url, tmp_path):
    datasets = [write(url, SONGS[::2]), write(f"file://{tmp_path}/別", SONGS[1::2])]
    train, held = split(datasets, HeldOut(fraction=0.3), seed=0)
    group = {song.id: song.group for song in SONGS}
    assert {group[song] for part in train for song in part}.isdisjoint(group[song] for part in held for song in part)


def test_the_split_is_the_same_every_time_and_follows_the_seed(url):
    dataset = write(url, SONGS)
    spec = HeldOut(fraction=0.3, by="song")
    assert split([dataset], spec, 1) == split([dataset], spec, 1)
    assert len({tuple(split([dataset], spec, seed)[1][0]) for seed in range(5)}) > 1
    assert len(split([dataset], spec, 1)[1][0]) == 6


def test_a_single_group_cannot_be_split_and_the_cure_is_told(url):
    dataset = write(url, SONGS[:4])
    with pytest.raises(DataError, match=r"all 4 songs are in one group.*\n.*by: song"):
        split([dataset], HeldOut(), seed=0)
    assert len(split([dataset], HeldOut(by="song"), seed=0)[1][0]) == 1


def test_a_single_song_cannot_be_split(url):
    with pytest.raises(DataError, match=r"1 song\(s\) cannot be split"):
        split([write(url, SONGS[:1])], HeldOut(by="song"), seed=0)

import dataclasses
import json

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from tests.unit.data.conftest import FORMAT, make_song
from trainer.data.shards import Shard, write_shard
from trainer.spec.errors import DataError

SONGS = [make_song(f"歌{i}", frames=10 + i) for i in range(20)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "歌.parquet"
    path.write_bytes(write_shard(SONGS, FORMAT))
    return path


def test_songs_come_back_as_they_were_written(path):
    shard = Shard(path)
    assert shard.format == FORMAT
    assert len(shard) == 20
    for written, read in zip(SONGS, shard, strict=True):
        assert dataclasses.replace(read, arrays={}) == dataclasses.replace(written, arrays={})
        for name, array in written.arrays.items():
            assert read.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(read.arrays[name], array)
    assert shard.song(17).id == "歌17"


def test_arrays_are_views_on_the_file_not_copies(path):
    codes = Shard(path).song(3).arrays["codes"]
    assert not codes.flags.owndata
    assert not codes.flags.writeable


def test_one_song_is_read_without_the_file(path):
    assert pq.ParquetFile(path).num_row_groups == 3


def test_the_same_songs_give_the_same_bytes():
    assert write_shard(SONGS, FORMAT) == write_shard(SONGS, FORMAT)


def test_pandas_reads_a_shard_as_it_is(path):
    frame = pandas.read_parquet(path)
    row = frame.iloc[5]
    assert (row["id"], row["lyrics"], row["frames"]) == ("歌5", "[verse]\nさくら さくら", 15)
    codes = np.frombuffer(row["codes"], "<u1").reshape(row["codes_shape"])
    np.testing.assert_array_equal(codes, SONGS[5].arrays["codes"])


def test_the_schema_says_what_the_numbers_are(path):
    said = json.loads(pq.read_schema(path).metadata[b"utaforge"])
    assert (said["codec"], said["vocabulary"], said["dtypes"]["codes"]) == ("pocket", 256, "uint8")


def test_arrays_are_little_endian_whatever_they_were():
    song = make_song("歌")
    big = {**song.arrays, "text_hidden": song.arrays["text_hidden"].astype(">f2")}
    assert write_shard([dataclasses.replace(song, arrays=big)], FORMAT) == write_shard([song], FORMAT)


def test_a_damaged_or_foreign_file_is_named(path, tmp_path):
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(DataError, match=r"歌\.parquet is damaged"):
        Shard(path)
    pandas.DataFrame({"歌": [1]}).to_parquet(path)
    with pytest.raises(DataError, match="no shard of utaforge"):
        Shard(path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((4, 5), np.int64), "song 歌: has arrays"),
        (np.zeros((3, 5), np.uint8), r"song 歌: codes have shape \[3, 5\], the codec makes \[4, T\]"),
        (np.full((4, 5), 200, np.uint8), "song 歌: holds code 200, but the codec has ids 0 to 127"),
    ],
)
def test_a_song_that_does_not_fit_the_format_is_refused(codes, message):
    song = make_song("歌")
    song = dataclasses.replace(song, arrays={**song.arrays, "codes": codes})
    with pytest.raises(DataError, match=message):
        write_shard([song], dataclasses.replace(FORMAT, vocabulary=128))

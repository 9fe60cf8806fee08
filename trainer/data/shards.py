"""A shard: a Parquet file of prepared songs, one row each.

Ids and texts are plain columns. Every array is a binary column (little-endian, C order) beside its shape, so that a
reader gets a view on the file's bytes. What the numbers mean stands in the schema's metadata under ``utaforge``.
pandas, DuckDB, Ray Data and HF ``datasets`` read shards as they are.
"""

import dataclasses
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.spec.errors import DataError

_KEY = b"utaforge"
_SONGS_PER_ROW_GROUP = 8
_TEXT_COLUMNS = ("id", "group", "tags", "lyrics", "source")


@dataclass(frozen=True)
class Song:
    """A prepared song.

    Attributes:
        id: unique in its dataset.
        group: singer, album or folder; songs of a group are held out together.
        tags: caption or tags.
        lyrics: may be empty.
        seconds: length of its audio.
        frames: ``T``, of all arrays that have a time axis.
        source: where it came from, for people.
        arrays: what the codec made of its audio, and what the family computes from the text.
    """

    id: str
    group: str
    tags: str
    lyrics: str
    seconds: float
    frames: int
    source: str
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ShardFormat:
    """What the arrays of a dataset's shards are.

    Attributes:
        family: the model family whose conditions they hold.
        codec: name of the codec that made the codes or latents.
        codec_fingerprint: hash of that codec's weights.
        sample_rate: of the audio behind them, Hz.
        frame_rate: frames per second.
        codebooks: ``K`` of ``codes``, 0 for latents alone.
        vocabulary: entries in each codebook.
        timed: arrays whose last axis is time.
        dtypes: numpy dtype of each array column.
        latent_shape: of ``latents``, without their time axis; empty where there are none, and in old shards.
    """

    family: str
    codec: str
    codec_fingerprint: str
    sample_rate: int
    frame_rate: float
    codebooks: int
    vocabulary: int
    timed: tuple[str, ...]
    dtypes: Mapping[str, str]
    latent_shape: tuple[int, ...] = ()

    def highest_code(self, arrays: Mapping[str, np.ndarray]) -> int:
        """The largest code in the arrays of a song; -1 if it has none."""
        codes = [arrays[name] for name in self.timed if arrays[name].dtype.kind in "iu"]
        return max((int(array.max()) for array in codes if array.size), default=-1)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "ShardFormat":
        """What ``to_dict`` gave."""
        return cls(**{**told, "timed": tuple(told["timed"]), "latent_shape": tuple(told.get("latent_shape", ()))})

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dataclasses.asdict(self), "dtypes": dict(sorted(self.dtypes.items()))}


def write_shard(songs: Sequence[Song], format: ShardFormat) -> bytes:
    """The shard file of ``songs``; the same songs give the same bytes.

    Raises:
        DataError: a song's arrays are not what ``format`` says.
    """
    for song in songs:
        _check(song, format)
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(song, name) for song in songs], pa.string()) for name in _TEXT_COLUMNS
    }
    columns["seconds"] = pa.array([song.seconds for song in songs], pa.float64())
    columns["frames"] = pa.array([song.frames for song in songs], pa.int32())
    for name, dtype in sorted(format.dtypes.items()):
        little = np.dtype(dtype).newbyteorder("<")
        arrays = [song.arrays[name] for song in songs]
        columns[name] = pa.array([array.astype(little).tobytes() for array in arrays], pa.binary())
        columns[f"{name}_shape"] = pa.array([array.shape for array in arrays], pa.list_(pa.int32()))
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(format.to_dict(), ensure_ascii=False)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, row_group_size=_SONGS_PER_ROW_GROUP)
    return sink.getvalue().to_pybytes()


def with_time(shape: Sequence[int]) -> str:
    """``[8, 16, T]`` for the other axes of latents."""
    return f"[{', '.join(map(str, (*shape, 'T')))}]"


class Shard:
    """A shard file, open for reading by any thread; songs are read one row group at a time.

    Raises:
        DataError: ``path`` is no shard of utaforge, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        metadata = self._file.schema_arrow.metadata or {}
        if _KEY not in metadata:
            raise DataError(f"{path} is a Parquet file, but no shard of utaforge", "make it with `utaforge prepare`")
        self.format = ShardFormat.from_dict(json.loads(metadata[_KEY]))

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[Song]:
        for row in range(len(self)):
            yield self.song(row)

    def song(self, row: int) -> Song:
        """The song in ``row``; its arrays are read-only views."""
        group, index = divmod(row, _SONGS_PER_ROW_GROUP)
        try:
            with self._lock:
                table = self._file.read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        record = table.slice(index, 1).select([*_TEXT_COLUMNS, "seconds", "frames"]).to_pylist()[0]
        return Song(**record, arrays={name: self._array(table, name, index) for name in self.format.dtypes})

    def _array(self, table: pa.Table, name: str, index: int) -> np.ndarray:
        shape = table.column(f"{name}_shape")[index].as_py()
        dtype = np.dtype(self.format.dtypes[name]).newbyteorder("<")
        buffer = table.column(name)[index].as_buffer()
        if buffer.size != int(np.prod(shape)) * dtype.itemsize:
            raise self._damaged(f"array {name} has {buffer.size} bytes, its shape is {shape}")
        return np.frombuffer(buffer, dtype).reshape(shape) if buffer.size else np.zeros(shape, dtype)

    def _damaged(self, reason: object) -> DataError:
        return DataError(f"{self.path} is damaged: {reason}", "make the dataset again with `utaforge prepare`")


def _check(song: Song, format: ShardFormat) -> None:
    cure = "prepare it with this codec"
    found = {name: array.dtype.name for name, array in song.arrays.items()}
    if found != dict(format.dtypes):
        raise DataError(f"song {song.id}: has arrays {found}, the dataset has {dict(format.dtypes)}", cure)
    codes = song.arrays.get("codes")
    if codes is not None and (codes.ndim != 2 or len(codes) != format.codebooks):
        raise DataError(
            f"song {song.id}: codes have shape {list(codes.shape)}, the codec makes [{format.codebooks}, T]", cure
        )
    latents = song.arrays.get("latents")
    if latents is not None and latents.shape[:-1] != format.latent_shape:
        made = with_time(format.latent_shape)
        raise DataError(f"song {song.id}: latents have shape {list(latents.shape)}, the codec makes {made}", cure)
    if (highest := format.highest_code(song.arrays)) >= format.vocabulary:
        raise DataError(
            f"song {song.id}: holds code {highest}, but the codec has ids 0 to {format.vocabulary - 1}", cure
        )
    for name in format.timed:
        if song.arrays[name].shape[-1] != song.frames:
            raise DataError(f"song {song.id}: has {song.frames} frames, its {name} {song.arrays[name].shape[-1]}", cure)

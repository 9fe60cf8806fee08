"""A dataset in the store: ``shards/*.parquet``, an index of its songs, and versions.

Shards and indexes are named by their hash and never change. ``versions/000001.json`` lists the files of a version with
sizes and hashes and is created conditionally: two publishers at once make two versions, each of them whole.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.spec.data import HeldOut
from trainer.spec.errors import DataError, StoreError
from trainer.store import Store, open_store

from .planner import Pool
from .shards import Shard, ShardFormat, Song, with_time, write_shard

log = logging.getLogger(__name__)
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Failure:
    """A song that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Songs:
    """The index of a dataset: one entry a song, in the order they were prepared.

    Attributes:
        ids: song ids.
        groups: singer, album or folder of each.
        frames: lengths in frames.
        seconds: lengths in seconds.
        highest: largest code in each.
        shards: file of each.
        rows: row of each in its shard.
    """

    ids: list[str]
    groups: list[str]
    frames: list[int]
    seconds: list[float]
    highest: list[int]
    shards: list[str]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Dataset:
    """One version of a dataset, open for reading. Get one by ``Dataset.open`` or from a ``Writer``.

    Files are read in place from a ``file://`` store; from elsewhere they are copied once per machine to ``cache``.
    Either way each is checked against the version's manifest before it is used.
    """

    def __init__(self, store: Store, version: int, manifest: Mapping[str, Any], cache: Path | None = None) -> None:
        self.store = store
        self.version = version
        self._manifest = manifest
        self._cache = cache or _default_cache()
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, url: str, version: int | None = None, cache: Path | None = None) -> "Dataset":
        """The dataset at ``url``, in its newest version or the one asked for.

        Raises:
            DataError: there is no such dataset or version.
        """
        store = open_store(url)
        found = _versions(store)
        if not found:
            raise DataError(f"{url} holds no dataset", "make one with `utaforge prepare JOB`, or correct the URL")
        version = found[-1] if version is None else version
        manifest = store.manifest(_version_name(version)) if version in found else None
        if manifest is None:
            raise DataError(f"{url} has no version {version}", f"it has {', '.join(map(str, found))}")
        return cls(store, version, manifest, cache)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    @property
    def digest(self) -> str:
        """Hash of everything in it; equal digests are equal songs."""
        return str(self._manifest["digest"])

    @property
    def prepared_from(self) -> str:
        """Hash of what it was prepared from."""
        return str(self._manifest["prepared_from"])

    @property
    def seconds(self) -> float:
        """Audio in it."""
        return float(self._manifest["seconds"])

    @property
    def pin(self) -> dict[str, Any]:
        """What names exactly this version: ``url``, ``version``, ``digest``."""
        return {"url": self.url, "version": self.version, "digest": self.digest}

    @cached_property
    def format(self) -> ShardFormat:
        """What its arrays are."""
        return ShardFormat.from_dict(self._manifest["format"])

    @cached_property
    def failures(self) -> list[Failure]:
        """Songs that were left out when it was prepared."""
        return [Failure(**failure) for failure in self._manifest["failures"]]

    @cached_property
    def songs(self) -> Songs:
        """Its index."""
        columns = pq.read_table(self._file(self._manifest["index"])).to_pydict()
        return Songs(**columns)

    def song(self, song: str) -> Song:
        """The song with the id ``song``, with its arrays as read-only views on the shard."""
        index = self._by_id[song]
        return self._shard(self.songs.shards[index]).song(self.songs.rows[index])

    def pool(self, ids: Sequence[str], weight: float = 1.0) -> Pool:
        """The songs ``ids`` as the planner wants them."""
        return Pool(ids, [self.songs.frames[self._by_id[song]] for song in ids], weight)

    def check_against(
        self,
        *,
        codebooks: int,
        vocabulary: int,
        frame_rate: float,
        latent_shape: tuple[int, ...] = (),
        fingerprint: str | None = None,
    ) -> None:
        """Make sure that a model with these codes or latents can be trained on it.

        Raises:
            DataError: it cannot; names the shard and the song if a code is out of range.
        """
        cure = "prepare the songs with this model's own codec"
        for song, highest, shard in zip(self.songs.ids, self.songs.highest, self.songs.shards, strict=True):
            if highest >= vocabulary:
                raise DataError(
                    f"{self.url}: song {song} in {shard} holds code {highest}, the model knows 0 to {vocabulary - 1}",
                    cure,
                )
        format = self.format
        expected = [
            ("codebooks", format.codebooks, codebooks),
            ("vocabulary", format.vocabulary, vocabulary),
            ("frame rate", format.frame_rate, frame_rate),
        ]
        if format.latent_shape:
            expected.append(("latents", with_time(format.latent_shape), with_time(latent_shape)))
        if fingerprint is not None:
            expected.append(("codec fingerprint", format.codec_fingerprint, fingerprint))
        for title, found, value in expected:
            if found != value:
                raise DataError(f"{self.url} was prepared with {title} {found}, the model expects {value}", cure)

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {song: index for index, song in enumerate(self.songs.ids)}

    def _open_shard(self, name: str) -> Shard:
        return Shard(self._file(name))

    def _file(self, name: str) -> Path:
        """The checked local copy of a file of this version."""
        entry = self._manifest["files"][name]
        if self.store.local is not None:
            path = self.store.local / name
            if not _is(path, entry):
                raise StoreError(
                    f"{self.url}/{name} is missing or damaged: it is not what its version's manifest says",
                    "restore this file from a copy, or make the dataset again with `utaforge prepare`",
                )
            return path
        path = self._cache / f"{entry['sha256']}.parquet"
        with _locked(path):
            if not _is(path, entry):
                self.store.fetch_file(name, entry, path)
        return path


class Writer:
    """Writes a new version of the dataset at ``store``, shard by shard; nothing is seen of it before ``commit``."""

    def __init__(self, store: Store, format: ShardFormat) -> None:
        self._store = store
        self._format = format
        self._files: dict[str, dict[str, Any]] = {}
        self.songs = Songs([], [], [], [], [], [], [])

    def add(self, songs: Sequence[Song]) -> None:
        """Put ``songs`` into the store as one shard.

        Raises:
            DataError: arrays that are not what the format says.
        """
        name = self._put("shards", write_shard(songs, self._format))
        for row, song in enumerate(songs):
            self.songs.ids.append(song.id)
            self.songs.groups.append(song.group)
            self.songs.frames.append(song.frames)
            self.songs.seconds.append(song.seconds)
            self.songs.highest.append(self._format.highest_code(song.arrays))
            self.songs.shards.append(name)
            self.songs.rows.append(row)

    def commit(self, prepared_from: str = "", failures: Sequence[Failure] = ()) -> Dataset:
        """Publish what was added as the next version."""
        shards = sorted(self._files)
        digest = hashlib.sha256(json.dumps([self._format.to_dict(), shards]).encode()).hexdigest()
        index = self._put("index", _index_file(self.songs))
        manifest = {
            "files": self._files,
            "index": index,
            "format": self._format.to_dict(),
            "songs": len(self.songs),
            "seconds": sum(self.songs.seconds),
            "digest": digest,
            "prepared_from": prepared_from,
            "failures": [vars(failure) for failure in failures],
        }
        content = json.dumps(manifest, ensure_ascii=False, indent=1).encode()
        version = 1 + max(_versions(self._store), default=0)
        while not self._store.create(_version_name(version), content):
            version += 1
        log.info("published version %d of %s: %d songs", version, self._store.url, len(self.songs))
        return Dataset(self._store, version, manifest)

    def _put(self, folder: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        name = f"{folder}/{digest[:16]}.parquet"
        self._store.create(name, data)
        self._files[name] = {"bytes": len(data), "sha256": digest}
        return name


def newest(url: str) -> Dataset | None:
    """The newest version of the dataset at ``url``, or None if there is none yet."""
    return Dataset.open(url) if _versions(open_store(url)) else None


def split(datasets: Sequence[Dataset], spec: HeldOut, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Hold songs out of training: song ids for training and for validation, by dataset.

    Groups (or songs) are ordered by a hash of their names and the seed, and held out from the front until ``fraction``
    of the songs is reached; so the choice is the same everywhere, and a group is never on both sides, not even when
    several datasets have parts of it.

    Raises:
        DataError: one side would be empty.
    """
    songs = [
        (index, song, group if spec.by == "group" else f"{index}/{song}")
        for index, dataset in enumerate(datasets)
        for song, group in zip(dataset.songs.ids, dataset.songs.groups, strict=True)
    ]
    sizes: dict[str, int] = {}
    for _, _, group in songs:
        sizes[group] = sizes.get(group, 0) + 1
    if len(sizes) < 2:
        raise _cannot_split(datasets, len(songs), spec)
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    held: set[str] = set()
    count = 0
    for group in order[:-1]:
        if held and count + sizes[group] / 2 > spec.fraction * len(songs):
            break
        held.add(group)
        count += sizes[group]
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in datasets], [[] for _ in datasets])
    for index, song, group in songs:
        sides[group in held][index].append(song)
    return sides


def _cannot_split(datasets: Sequence[Dataset], songs: int, spec: HeldOut) -> DataError:
    where = ", ".join(dataset.url for dataset in datasets)
    if spec.by == "group" and songs > 1:
        return DataError(
            f"{where}: all {songs} songs are in one group, so none can be held out for validation without its group",
            "write data.validation: {by: song}, or sort the songs into folders by singer or album",
        )
    return DataError(
        f"{where}: {songs} song(s) cannot be split into training and validation",
        "add songs, or name a dataset of its own in data.validation: {dataset: …}",
    )


def _versions(store: Store) -> list[int]:
    found = (re.fullmatch(r"versions/(\d{6,})\.json", entry.path) for entry in store.list("versions"))
    return sorted(int(match[1]) for match in found if match)


def _version_name(version: int) -> str:
    return f"versions/{version:06d}.json"


def _index_file(songs: Songs) -> bytes:
    sink = BytesIO()
    pq.write_table(pa.table(vars(songs)), sink, compression="zstd")
    return sink.getvalue()


def _default_cache() -> Path:
    return Path(os.environ.get("UTAFORGE_HOME", ".utaforge")).absolute() / "cache" / "shards"


def _is(path: Path, entry: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

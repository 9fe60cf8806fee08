"""What a source of songs is, and how the files behind it are read."""

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType

import numpy as np

from trainer.data.dataset import Failure
from trainer.spec.errors import DataError
from trainer.store import Store, open_store

AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".aif", ".aiff", ".alac", ".mp3", ".ogg", ".m4a", ".mp4", ".aac", ".wma", ".opus"}
)


@dataclass(frozen=True)
class SourceSong:
    """A song as its owner keeps it.

    Attributes:
        id: unique in its source.
        group: singer, album or folder; a song that belongs to none is a group of its own.
        audio: path of the audio file in the source's files; where there are only codes, what they are known by.
        tags: caption or tags, may be empty.
        lyrics: may be empty.
    """

    id: str
    group: str
    audio: str
    tags: str
    lyrics: str


class SongSource(ABC):
    """Songs to be prepared. Use it in a ``with`` statement: it may hold temporary files."""

    files: "Files"
    codes_suffix = ".tokens.npy"
    """Takes the place of the audio file's ending in the name of a file of codes beside it."""

    def __enter__(self) -> "SongSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def inputs(self) -> str:
        """A text that changes whenever a file of the source does."""
        return self.files.inputs()

    @abstractmethod
    def songs(self) -> list[SourceSong | Failure]:
        """Every song, and what should have been one but cannot be read, in a fixed order."""

    def codes(self, song: SourceSong) -> np.ndarray | None:
        """The array of codes that lies beside the song, which then need not be made; None if there is none.

        Raises:
            DataError: the file is no array.
        """
        return self._array(song, self.codes_suffix, "codes")

    def features(self, song: SourceSong, name: str) -> np.ndarray:
        """The array that lies beside the song as ``SONG.NAME.npy``.

        Raises:
            DataError: there is none, or the file is no array.
        """
        found = self._array(song, f".{name}.npy", "features")
        if found is None:
            raise DataError(f"has no {PurePosixPath(song.audio).stem}.{name}.npy beside it, which the model asks for")
        return found

    def _array(self, song: SourceSong, suffix: str, what: str) -> np.ndarray | None:
        path = str(PurePosixPath(song.audio).with_suffix(suffix))
        if path not in self.files.sizes:
            return None
        try:
            return np.load(BytesIO(self.files.store.get(path)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} is no array of {what}: {error}") from error


class Files:
    """The files below a folder or a store's URL.

    Args:
        place: a path (a relative one starts from the current folder) or a store URL.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.store: Store = open_store(place if "://" in place else f"file://{Path(place).absolute()}")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Path → size of every file whose path has no hidden part.

        Raises:
            DataError: the folder does not exist.
        """
        return {path: size for path, (size, _) in self._entries.items()}

    def inputs(self) -> str:
        """Names, sizes and times of the files."""
        return json.dumps(self._entries)

    def text(self, path: str) -> str:
        """The text in a file, without a byte order mark; empty if there is no such file.

        Raises:
            DataError: it is not UTF-8.
        """
        if path not in self.sizes:
            return ""
        try:
            return self.store.get(path).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text (byte {error.start + 1})",
                f"convert it, e.g. from Shift-JIS: iconv -f SHIFT_JIS -t UTF-8 {path}",
            ) from error

    @contextmanager
    def local(self, path: str) -> Iterator[Path]:
        """The file as one on this machine; a copy is removed afterwards."""
        if self.store.local is not None:
            yield self.store.local / path
            return
        folder = Path(tempfile.mkdtemp(prefix="utaforge-"))
        try:
            copy = folder / PurePosixPath(path).name
            self.store.download(path, copy)
            yield copy
        finally:
            shutil.rmtree(folder)

    @cached_property
    def _entries(self) -> dict[str, tuple[int, float]]:
        if self.store.local is not None and not self.store.local.is_dir():
            raise DataError(f"{self.place} is not a folder", "correct data.prepare.source.path in the job file")
        return {
            entry.path: (entry.bytes, entry.modified)
            for entry in self.store.list()
            if not any(part.startswith(".") for part in entry.path.split("/"))
        }


def is_audio(path: str) -> bool:
    """Whether the file's ending is one of ours."""
    return PurePosixPath(path).suffix.lower() in AUDIO_SUFFIXES


def own_group(path: str) -> str:
    """The folder that ``path`` lies in; a file that lies in none is its own group."""
    folder = str(PurePosixPath(path).parent)
    return folder if folder != "." else str(PurePosixPath(path).with_suffix(""))


def without_twins(songs: list[SourceSong | Failure]) -> list[SourceSong | Failure]:
    """``songs``, where a second song with the same id is a failure."""
    first: dict[str, str] = {}
    checked: list[SourceSong | Failure] = []
    for song in songs:
        if isinstance(song, SourceSong) and first.setdefault(song.id, song.audio) != song.audio:
            song = Failure(song.audio, f"has the same name as {first[song.id]}")
        checked.append(song)
    return checked

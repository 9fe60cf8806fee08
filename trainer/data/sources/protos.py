"""fish-speech's packed data: recordings with their codes, in ``.protos`` files."""

from collections.abc import Iterator

import numpy as np

from trainer.data.dataset import Failure
from trainer.families.fish_speech.protos import read_protos
from trainer.shapes import Int
from trainer.spec.data import ProtosSource
from trainer.spec.errors import DataError

from .base import Files, SongSource, SourceSong


class Protos(SongSource):
    """Recordings packed with their codes; each speaker is a group, the transcript becomes the lyrics.

    A recording is named by its file and its place in it, from 1: ``00000000.protos:1``.
    """

    def __init__(self, spec: ProtosSource) -> None:
        self.files = Files(spec.path)
        self._codes: dict[str, Int[np.ndarray, "K T"]] = {}

    def songs(self) -> list[SourceSong | Failure]:
        """Recordings by file, in the packer's order; a damaged file is one failure."""
        return [song for path in self.files.sizes if path.endswith(".protos") for song in self._songs(path)]

    def codes(self, song: SourceSong) -> Int[np.ndarray, "K T"]:
        """As they were packed."""
        return self._codes[song.audio]

    def _songs(self, path: str) -> Iterator[SourceSong | Failure]:
        with self.files.local(path) as file:
            try:
                groups = list(read_protos(file))
            except DataError as error:
                yield Failure(path, error.problem.removeprefix(f"{file}: "))
                return
        recordings = [(group, sentence) for group in groups for sentence in group.sentences]
        for place, (group, sentence) in enumerate(recordings, 1):
            name = f"{path}:{place}"
            text = sentence.texts[0].strip() if sentence.texts else ""
            if not text:
                yield Failure(name, "has no transcript")
                continue
            self._codes[name] = sentence.codes
            stem = path.removesuffix(".protos")
            yield SourceSong(f"{stem}/{place}", group.name or stem, name, "", text)

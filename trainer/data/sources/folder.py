"""Audio files with tags and lyrics beside them."""

from pathlib import PurePosixPath

from trainer.data.dataset import Failure
from trainer.spec.data import FolderSource
from trainer.spec.errors import DataError

from .base import Files, SongSource, SourceSong, is_audio, own_group, without_twins


class Folder(SongSource):
    """A folder of audio files, sub-folders included; each sub-folder is a group."""

    def __init__(self, spec: FolderSource) -> None:
        self.files = Files(spec.path)
        self._tags = spec.tags_filename
        self._lyrics = spec.lyrics_filename

    def songs(self) -> list[SourceSong | Failure]:
        """Songs by path; missing texts are empty."""
        return without_twins([self._song(path) for path in self.files.sizes if is_audio(path)])

    def _song(self, path: str) -> SourceSong | Failure:
        try:
            tags, lyrics = (self.files.text(_beside(path, pattern)) for pattern in (self._tags, self._lyrics))
        except DataError as error:
            return Failure(path, error.problem)
        return SourceSong(str(PurePosixPath(path).with_suffix("")), own_group(path), path, tags, lyrics)


def _beside(path: str, pattern: str) -> str:
    name = pattern.replace("{stem}", PurePosixPath(path).stem)
    if "/" in name or "\\" in name:
        raise DataError(f"{pattern!r} leads out of the song's folder", "write a plain file name, like {stem}.txt")
    return str(PurePosixPath(path).with_name(name))

"""Recordings by speaker, each with a transcript, as fish-speech keeps them."""

from pathlib import PurePosixPath

from trainer.data.dataset import Failure
from trainer.spec.data import SpeakersSource
from trainer.spec.errors import DataError

from .base import Files, SongSource, SourceSong, is_audio, own_group, without_twins


class Speakers(SongSource):
    """``SPEAKER/NAME.wav`` with ``SPEAKER/NAME.lab``; each speaker is a group, the transcript becomes the lyrics.

    Codes are in ``NAME.npy``, where fish-speech's ``tools/vqgan/extract_vq.py`` (v1.5.1) writes them.
    """

    codes_suffix = ".npy"

    def __init__(self, spec: SpeakersSource) -> None:
        self.files = Files(spec.path)

    def songs(self) -> list[SourceSong | Failure]:
        """Recordings by path; one without a transcript is a failure."""
        paths = [path for path in self.files.sizes if is_audio(path) and "/" in path]
        return without_twins([self._song(path) for path in paths])

    def _song(self, path: str) -> SourceSong | Failure:
        transcript = str(PurePosixPath(path).with_suffix(".lab"))
        if transcript not in self.files.sizes:
            return Failure(path, f"has no transcript {PurePosixPath(transcript).name}")
        try:
            text = self.files.text(transcript)
        except DataError as error:
            return Failure(path, error.problem)
        return SourceSong(str(PurePosixPath(path).with_suffix("")), own_group(path), path, "", text)

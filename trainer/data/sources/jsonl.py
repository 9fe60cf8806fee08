"""A JSON Lines file that names audio files and says what they are."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.dataset import Failure
from trainer.spec.data import JsonlSource
from trainer.spec.errors import DataError

from .base import Files, SongSource, SourceSong, is_audio, own_group, without_twins


class Jsonl(SongSource):
    """Songs named by a JSON Lines file; their paths are relative to it and stay in its folder."""

    def __init__(self, spec: JsonlSource) -> None:
        place, slash, self._name = spec.path.rpartition("/")
        self.files = Files(place if slash else str(Path.cwd()))
        self._columns = spec.columns

    def songs(self) -> list[SourceSong | Failure]:
        """Songs by line; a line that cannot be used is a failure named by its number."""
        if self._name not in self.files.sizes:
            raise DataError(f"{self.files.place}/{self._name} does not exist", "correct data.prepare.source.path")
        lines = self.files.text(self._name).splitlines()
        return without_twins([self._song(number, line) for number, line in enumerate(lines, 1) if line.strip()])

    def _song(self, number: int, line: str) -> SourceSong | Failure:
        where = f"{self._name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            return Failure(where, f"is not JSON ({error})")
        if not isinstance(record, dict):
            return Failure(where, "is not a JSON object")
        path = self._field(record, "path")
        if reason := self._unusable(path):
            return Failure(where, reason)
        return SourceSong(
            id=str(PurePosixPath(path).with_suffix("")),
            group=self._field(record, "group") or own_group(path),
            audio=path,
            tags=self._field(record, "tags") or self._field(record, "description"),
            lyrics=self._field(record, "lyrics"),
        )

    def _field(self, record: dict[str, Any], name: str) -> str:
        value = record.get(self._columns.get(name, name))
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return "" if value is None else str(value).strip()

    def _unusable(self, path: str) -> str:
        if not path:
            return f"has no {self._columns.get('path', 'path')!r}"
        if path.startswith("/") or ".." in path.split("/") or "\\" in path:
            return f"{path} leads out of the folder of {self._name}; write a path inside it"
        if str(PurePosixPath(path)) not in self.files.sizes:
            return f"{path} does not exist"
        return "" if is_audio(path) else f"{path} has no ending of an audio file"

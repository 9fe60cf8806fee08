"""Sources of songs, one file each; ``open_source`` finds the one that a job names."""

from trainer.spec.data import DemoSource, FolderSource, JsonlSource, ProtosSource, Source, SpeakersSource
from trainer.spec.errors import DataError

from .base import SongSource, SourceSong
from .demo import Demo
from .folder import Folder
from .jsonl import Jsonl
from .protos import Protos
from .speakers import Speakers


def open_source(spec: Source) -> SongSource:
    """The source that ``data.prepare.source`` describes."""
    match spec:
        case FolderSource():
            return Folder(spec)
        case JsonlSource():
            return Jsonl(spec)
        case SpeakersSource():
            return Speakers(spec)
        case ProtosSource():
            return Protos(spec)
        case DemoSource():
            return Demo(spec)
        case _:
            raise DataError(
                f"data.prepare.source: type {spec.type} is not available yet",
                "use folder, jsonl, speakers, protos or demo",
            )


__all__ = ["SongSource", "SourceSong", "open_source"]

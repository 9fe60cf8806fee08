"""Songs synthesised by utaforge itself."""

import tempfile
from types import TracebackType

from trainer.data.dataset import Failure
from trainer.data.demo import write_songs
from trainer.spec.data import DemoSource, FolderSource

from .base import SongSource, SourceSong
from .folder import Folder


class Demo(SongSource):
    """The demo's songs in one style; they exist only while they are prepared."""

    def __init__(self, spec: DemoSource) -> None:
        self._spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="utaforge-demo-")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def inputs(self) -> str:
        """The same always: the job file says it all."""
        return ""

    def songs(self) -> list[SourceSong | Failure]:
        """Writes the songs first."""
        write_songs(self._folder.name, songs=self._spec.songs, style=self._spec.style)
        folder = Folder(FolderSource(type="folder", path=self._folder.name))
        self.files = folder.files
        return folder.songs()

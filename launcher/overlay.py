"""Code of a checkout, put before that of an image: for those who work on the trainer itself."""

import hashlib
import zipfile
from functools import cached_property
from io import BytesIO
from pathlib import Path

from trainer.spec import JobError
from trainer.store import open_store

PACKAGE = "trainer"
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Overlay:
    """The package ``trainer`` of a checkout as an archive that Ray unpacks (``py_modules``), named by its hash.

    Args:
        folder: the checkout.
        store_url: where the archive goes, below ``code/``.

    Raises:
        JobError: there is no such package, or the store is one that Ray cannot read archives from.
    """

    def __init__(self, folder: str, store_url: str) -> None:
        self.folder = Path(folder).resolve()
        if not (self.folder / PACKAGE / "__init__.py").is_file():
            raise JobError(
                f"cluster.code: there is no package {PACKAGE} in {self.folder}", "name a checkout of utaforge"
            )
        if not store_url.startswith("s3://"):
            raise JobError("cluster.code: Ray reads code from s3:// only", "build the code into the image: make image")
        self._store = open_store(store_url).at("code")

    @property
    def url(self) -> str:
        """Where it is, once uploaded."""
        return f"{self._store.url}/{self._name}"

    def upload(self) -> bool:
        """Put it there; False if it was there already."""
        return not self._store.exists(self._name) and self._store.create(self._name, self._archive)

    @cached_property
    def _archive(self) -> bytes:
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((self.folder / PACKAGE).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    inside = zipfile.ZipInfo(f"code/{path.relative_to(self.folder)}", _EPOCH)
                    archive.writestr(inside, path.read_bytes(), zipfile.ZIP_DEFLATED)
        return packed.getvalue()

    @property
    def _name(self) -> str:
        return f"{hashlib.sha256(self._archive).hexdigest()[:16]}.zip"

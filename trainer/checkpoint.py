"""Checkpoints: committed to the store beside training, found again, restored, thinned out.

A checkpoint is a folder ``step-00000050/`` of files and a ``manifest.json`` with their sizes and hashes. The manifest
is put last and only if there is none yet: its existence *is* the commit, and a reader trusts nothing else.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.errors import StoreError
from trainer.spec.job import Keep
from trainer.store import MANIFEST, Store

log = logging.getLogger(__name__)
RETRY_SECONDS = (1.0, 5.0, 15.0)
"""Waits between the tries of one upload, beyond the transport's own."""


@dataclass(frozen=True)
class Commit:
    """One committed checkpoint.

    Attributes:
        step: optimizer steps done.
        meta: what ``Checkpoints.save`` was given (data position, world size, ``validation_loss``, …).
    """

    step: int
    meta: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder under ``checkpoints/``."""
        return folder_of(self.step)

    @property
    def validation_loss(self) -> float:
        """Held-out loss at this step; infinite if it was not measured or not finite."""
        loss = self.meta.get("validation_loss")
        return math.inf if loss is None else loss


class Checkpoints:
    """The checkpoints of one run; ``save`` and ``wait`` are for rank 0 alone, the rest for anyone.

    Args:
        store: ``<run>/checkpoints``.
        keep: how many of the newest and of the best stay.
        retry_seconds: waits between the tries of one upload.
    """

    def __init__(self, store: Store, keep: Keep, retry_seconds: tuple[float, ...] = RETRY_SECONDS) -> None:
        self.store = store
        self.keep = keep
        self._retry_seconds = retry_seconds
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None

    def save(
        self,
        step: int,
        files: Mapping[str, Path | bytes],
        meta: Mapping[str, Any],
        before: Callable[[], None] | None = None,
    ) -> None:
        """Commit a checkpoint beside training; returns once the upload before it is done.

        Files given as paths must stay as they are until ``wait``. If the step is committed already (by an earlier
        attempt), that commit stands. After the commit, checkpoints that ``keep`` does not name and leftovers of dead
        attempts go.

        Args:
            step: optimizer steps done.
            files: contents by name.
            meta: goes into the manifest; JSON, numbers that are not finite become null. ``validation_loss`` decides
                which are best.
            before: called first, in the background too (the journal reaches the store before the checkpoint does).

        Raises:
            StoreError: the *previous* checkpoint could not be uploaded, in spite of retries. This one is not begun;
                the next call begins afresh.
        """
        self.wait()
        self._in_flight = self._uploader.submit(self._commit, step, dict(files), dict(meta), before)

    def wait(self) -> None:
        """Return when nothing is in flight; raises ``StoreError`` if the last upload failed (once)."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight:
            in_flight.result()

    def commits(self) -> Iterator[Commit]:
        """Whole commits, newest first. One whose files are gone or cut short is skipped with a warning."""
        for name, sizes in sorted(self._folders().items(), reverse=True):
            if MANIFEST in sizes and (commit := self._read(name, sizes)):
                yield commit

    def newest(self) -> Commit | None:
        """The commit to resume from."""
        return next(self.commits(), None)

    def best(self) -> Commit | None:
        """The commit with the lowest held-out loss, the newest of equals; None if no commit knows its loss."""
        return next((c for c in _by_loss(list(self.commits())) if math.isfinite(c.validation_loss)), None)

    def restore(self, commit: Commit, into: Path) -> None:
        """Download a commit's files, verified; raises ``StoreError`` naming what is missing or differs."""
        self.store.at(commit.name).fetch(into)

    def _commit(
        self, step: int, files: dict[str, Path | bytes], meta: dict[str, Any], before: Callable[[], None] | None
    ) -> None:
        for wait in (*self._retry_seconds, None):
            try:
                if before:
                    before()
                self._publish(step, files, meta)
                break
            except StoreError as error:
                if wait is None:
                    raise StoreError(
                        f"the checkpoint of step {step} could not be uploaded: {error.problem}", error.cure
                    ) from error
                log.warning("checkpoint of step %d: %s; trying again in %g s", step, error.problem, wait)
                time.sleep(wait)
        try:
            self._retain()
        except StoreError as error:
            log.warning("old checkpoints could not be removed, they stay until the next commit: %s", error.problem)

    def _publish(self, step: int, files: dict[str, Path | bytes], meta: dict[str, Any]) -> None:
        name = folder_of(step)
        found = self._folders().get(name, {})
        if MANIFEST in found and self._read(name, found):
            return
        self._remove(name, found)
        self.store.at(name).publish(files, step=step, meta={key: _json(value) for key, value in meta.items()})

    def _retain(self) -> None:
        folders = self._folders()
        commits = list(self.commits())
        best = [commit for commit in _by_loss(commits) if math.isfinite(commit.validation_loss)]
        kept = {commit.name for commit in commits[: self.keep.last] + best[: self.keep.best]}
        for name in sorted(folders.keys() - kept):
            self._remove(name, folders[name])

    def _remove(self, name: str, files: Mapping[str, int]) -> None:
        at = self.store.at(name)
        for batch in ([MANIFEST], [file for file in files if file != MANIFEST]):
            at.delete([file for file in batch if file in files])

    def _folders(self) -> dict[str, dict[str, int]]:
        """Folder → file → bytes, from one listing."""
        folders: dict[str, dict[str, int]] = {}
        for entry in self.store.list():
            name, _, file = entry.path.partition("/")
            if file and re.fullmatch(r"step-\d{8,}", name):
                folders.setdefault(name, {})[file] = entry.bytes
        return folders

    def _read(self, name: str, sizes: Mapping[str, int]) -> Commit | None:
        manifest = self.store.at(name).manifest()
        if manifest is None:
            return None
        wrong = [
            file for file, facts in manifest["files"].items() if sizes.get(facts.get("path", file)) != facts["bytes"]
        ]
        if wrong:
            log.warning("checkpoint %s is skipped: %s missing or cut short", name, ", ".join(wrong))
            return None
        return Commit(manifest["step"], manifest["meta"])


def folder_of(step: int) -> str:
    """``step-00000050``."""
    return f"step-{step:08d}"


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_loss(commits: list[Commit]) -> list[Commit]:
    return sorted(commits, key=lambda commit: (commit.validation_loss, -commit.step))

"""Checkpoints: committed to the store beside training, found again, restored, thinned out.

A checkpoint is a folder ``step-00000050/`` of files and a ``manifest.json`` with their sizes and hashes. The manifest
is put last and only if there is none yet: its existence *is* the commit, and a reader trusts nothing else.
"""

import json
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
SHARE_SECONDS, SHARE_POLL_SECONDS = 1800.0, 0.2
"""How long rank 0 waits for the parts of the others, and how often it looks."""
RETRY_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 300.0)
"""Waits between the tries of one upload, beyond the transport's own; the next checkpoint has to wait for its end."""


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


@dataclass(frozen=True)
class Share:
    """Which part of a checkpoint this rank writes, where every rank writes a part.

    Attributes:
        rank: of this process; rank 0 commits what all have written.
        world: number of ranks.
        attempt: the same on all ranks, another after each restart, so that a dead attempt's parts are never taken.
    """

    rank: int
    world: int
    attempt: int

    def manifest(self, rank: int) -> str:
        """Name of the list of the files of ``rank``."""
        return f"share-{self.attempt:016x}-{rank}.json"


class Checkpoints:
    """The checkpoints of one run; ``save`` and ``wait`` are for those who write, the rest for anyone.

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
        share: Share | None = None,
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
            before: called first, in the background too (log and journal reach the store before the checkpoint does).
            share: this rank's part, if all ranks save; without it, rank 0 alone does. File names differ between ranks.

        Raises:
            StoreError: the *previous* checkpoint could not be uploaded, in spite of retries. This one is not begun;
                the next call begins afresh.
        """
        self.wait()
        self._in_flight = self._uploader.submit(self._commit, step, dict(files), dict(meta), before, share)

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
        self,
        step: int,
        files: dict[str, Path | bytes],
        meta: dict[str, Any],
        before: Callable[[], None] | None,
        share: Share | None,
    ) -> None:
        for wait in (*self._retry_seconds, None):
            try:
                if before:
                    before()
                self._publish(step, files, meta, share)
                break
            except StoreError as error:
                if wait is None:
                    raise StoreError(
                        f"the checkpoint of step {step} could not be uploaded: {error.problem}", error.cure
                    ) from error
                log.warning("checkpoint of step %d: %s; trying again in %g s", step, error.problem, wait)
                time.sleep(wait)
        if share and share.rank:
            return
        try:
            self._retain(step)
        except StoreError as error:
            log.warning("old checkpoints could not be removed, they stay until the next commit: %s", error.problem)

    def _publish(self, step: int, files: dict[str, Path | bytes], meta: dict[str, Any], share: Share | None) -> None:
        name = folder_of(step)
        at, found = self.store.at(name), self._folders().get(name, {})
        if MANIFEST in found and self._read(name, found):
            return
        told = {"step": step, "meta": {key: _json(value) for key, value in meta.items()}}
        if share is None:
            self._remove(name, found)
            at.publish(files, **told)
            return
        at.publish(files, manifest=share.manifest(share.rank))
        if share.rank == 0:
            whole = {name: facts for part in self._shares(at, share) for name, facts in part.items()}
            at.create(MANIFEST, json.dumps({"files": whole, **told}).encode())

    def _shares(self, at: Store, share: Share) -> Iterator[dict[str, Any]]:
        """The lists of all ranks' files, as they come in."""
        deadline = time.monotonic() + SHARE_SECONDS
        for rank in range(share.world):
            while (part := at.manifest(share.manifest(rank))) is None:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{at.url}: rank {rank} did not upload its part within {SHARE_SECONDS:.0f} s",
                        "see logs/ of that rank in the run directory",
                    )
                time.sleep(SHARE_POLL_SECONDS)
            yield part["files"]

    def _retain(self, step: int) -> None:
        """Remove what ``keep`` does not name; what other ranks have begun of later checkpoints stays."""
        folders = {name: files for name, files in self._folders().items() if name <= folder_of(step)}
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

"""A growing local file and its copy in the store."""

import logging
import threading
from pathlib import Path

from trainer.spec.errors import StoreError
from trainer.store import Store

log = logging.getLogger(__name__)
SECONDS = 5.0
BYTES_PER_SECOND = 200_000
"""A long file is copied less often than every ``SECONDS``, so that copying stays below this rate."""


class Mirror:
    """Copies a file that only grows to ``name`` in ``store``: in a thread now and then, and whenever asked.

    A store that is out of reach is tried again later; nothing but ``now`` and ``close`` raises.
    """

    def __init__(self, store: Store, name: str, path: Path) -> None:
        self._store, self._name, self._path = store, name, path
        self._copying, self._closed, self._copied = threading.Lock(), threading.Event(), 0
        self._thread = threading.Thread(target=self._now_and_then, name=f"mirror {name}", daemon=True)
        self._thread.start()

    def now(self) -> None:
        """Bring the copy up to date; raises ``StoreError``."""
        with self._copying:
            content = self._path.read_bytes()
            if len(content) == self._copied:
                return
            self._store.put(self._name, content)
            self._copied = len(content)

    def close(self) -> None:
        """Copy a last time; raises ``StoreError``."""
        self._closed.set()
        self._thread.join()
        self.now()

    def _now_and_then(self) -> None:
        lost = False
        while not self._closed.wait(max(SECONDS, self._copied / BYTES_PER_SECOND)):
            try:
                self.now()
                lost = False
            except StoreError as error:
                if not lost:
                    log.warning("%s could not be copied to the store, trying on: %s", self._name, error.problem)
                lost = True

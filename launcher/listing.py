"""All runs of a store, and how they stand: many at once, each namespace of a Kubernetes asked once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from launcher.backends.base import JobStatus
from launcher.runs import READERS, Attempt, NoRun, Run, Status, kubernetes_jobs, runs_of
from trainer.spec.errors import ClusterError, UtaforgeError


def all_runs(store_url: str) -> list[Status]:
    """How every run in a store stands, by name."""
    place = runs_of(store_url)
    runs = [Run(place.at(name)) for name in place.folders()]
    with ThreadPoolExecutor(READERS) as pool:
        asked = partial(_status_or_none, ask=_Asked())
        return [status for status in pool.map(asked, runs) if status]


class _Asked:
    """How programs stand, where many are asked about: each namespace of a Kubernetes is listed once."""

    def __init__(self) -> None:
        self._listing = threading.Lock()
        self._known: dict[tuple[str | None, str | None], dict[str, JobStatus] | ClusterError] = {}

    def __call__(self, run: Run, attempt: Attempt) -> JobStatus | None:
        if attempt.backend != "kubernetes":
            return run.ask(attempt)
        place = attempt.context, attempt.namespace
        with self._listing:
            if place not in self._known:
                self._known[place] = _listed(attempt)
        known = self._known[place]
        if isinstance(known, ClusterError):
            raise known
        return known.get(attempt.submission)


def _listed(attempt: Attempt) -> dict[str, JobStatus] | ClusterError:
    try:
        return kubernetes_jobs(attempt).statuses()
    except ClusterError as error:
        return error


def _status_or_none(run: Run, ask: _Asked) -> Status | None:
    """None for a folder that is no run; a run that cannot be read is shown as failed."""
    try:
        return run.status(partial(ask, run))
    except NoRun:
        return None
    except (UtaforgeError, ValueError, KeyError, TypeError) as error:
        problem = error.problem if isinstance(error, UtaforgeError) else f"its files cannot be read: {error}"
        return Status(run.name, run.url, "failed", 0, 0, None, 0, None, problem, "restore or remove it", None)

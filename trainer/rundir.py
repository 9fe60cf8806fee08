"""The run directory, seen from the trainer: its job, its plan, and how a failure is told."""

import json
import logging
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from trainer.spec import Job, job_from_json
from trainer.spec.data import ValidationSet
from trainer.spec.errors import StoreError, TrainingError, UtaforgeError
from trainer.store import Store, open_store

log = logging.getLogger(__name__)
FAILURE = "failure.json"
RESULT = "result.json"


class RunDirectory:
    """``<store>/runs/<run>/``, which the launcher has made before any rank starts."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = self.url.rsplit("/", 1)[-1]
        self.store: Store = open_store(self.url)

    @cached_property
    def job(self) -> Job:
        """The resolved job."""
        return job_from_json(self.store.get("job.json").decode())

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan: ranks, device, strategy, precision, micro-batch."""
        return json.loads(self.store.get("plan.json"))

    @cached_property
    def attempt(self) -> int:
        """Number of the newest submission, which this process belongs to; 0 where nobody submitted it."""
        numbers = [int(PurePosixPath(entry.path).stem) for entry in self.store.list("attempts")]
        return max(numbers, default=0)

    def began(self) -> float:
        """When the first program of this attempt began, seconds since 1970: later clusters are told the same."""
        name = f"began/{self.attempt:04d}.json"
        self.store.create(name, json.dumps({"time": time.time()}).encode())
        return json.loads(self.store.get(name))["time"]

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.store.exists(RESULT)

    @property
    def has_pinned_data(self) -> bool:
        """Whether an attempt has come so far as to fix the versions of the datasets."""
        return self.store.exists("data.json")

    @property
    def pinned_data(self) -> dict[str, Any]:
        """``train`` and, if it is a dataset of its own, ``validation``: URL, version and digest of each dataset."""
        return json.loads(self.store.get("data.json"))

    def pin_data(self, pin: Callable[[str], dict[str, Any]]) -> None:
        """Fix the versions of the job's datasets, if no earlier attempt has: all attempts see the same songs.

        Args:
            pin: dataset URL → URL, version and digest of its newest version.
        """
        if self.has_pinned_data:
            return
        data = self.job.data
        pins: dict[str, Any] = {"train": [pin(ref.dataset) for ref in data.train]}
        if isinstance(data.validation, ValidationSet):
            pins["validation"] = pin(data.validation.dataset)
        self.store.create("data.json", json.dumps(pins, indent=1).encode())

    def finish(self, result: dict[str, Any]) -> None:
        """Leave the result, with paths relative to the run directory; from now on the run is finished, for ever.

        It says all that a list of runs tells, so that a finished run is read at once.
        """
        told = {"time": time.time(), "attempt": self.attempt, "backend": self.job.cluster.backend, **result}
        self.store.create(RESULT, json.dumps(told, indent=1).encode())

    def report_failure(self, error: UtaforgeError) -> None:
        """Leave word of why the run cannot go on, for whoever asks later; never raises."""
        try:
            told = {
                "time": time.time(),
                "attempt": self.attempt,
                "problem": error.problem,
                "cure": error.cure,
                "exit_code": error.exit_code,
            }
            self.store.put(FAILURE, json.dumps(told, ensure_ascii=False, indent=1).encode())
        except StoreError as unreachable:
            log.error("%s\nthis could not be written to the run directory: %s", error, unreachable)

    def raise_reported_failure(self) -> None:
        """Raise what this attempt has reported, if it has; what an earlier one reported is forgotten."""
        told = self.store.get_or_none(FAILURE)
        if told is None:
            return
        failure = json.loads(told)
        if failure["attempt"] != self.attempt:
            self.store.delete([FAILURE])
            return
        error = TrainingError(failure["problem"], failure["cure"])
        error.exit_code = failure["exit_code"]
        raise error


def unexpected(error: Exception) -> TrainingError:
    """An error that nobody foresaw, as people are told of it; its traceback is logged."""
    log.error("%s", "".join(traceback.format_exception(error)))
    return TrainingError(
        f"the trainer met an error of its own: {type(error).__name__}: {error}",
        "the whole story is in logs/ of the run directory; please report it",
    )

"""What a backend is: it brings up a Ray cluster, hands out its jobs, and takes down what it brought up."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from trainer.spec.errors import UtaforgeError

State = Literal["pending", "running", "succeeded", "failed", "stopped"]
Say = Callable[[str], None]
"""Takes one line about what is going on, for people."""


@dataclass(frozen=True)
class JobStatus:
    """How a submitted program stands.

    Attributes:
        state: the backend's word; a result is taken from here and from nowhere else.
        message: why, as the backend tells it.
        exit_code: of the program, once it has one.
    """

    state: State
    message: str = ""
    exit_code: int | None = None

    @property
    def over(self) -> bool:
        """Whether the program has ended, one way or another."""
        return self.state in ("succeeded", "failed", "stopped")


class Jobs(Protocol):
    """Programs on one cluster. Every method raises ``ClusterError`` if the cluster cannot be reached."""

    address: str

    def submit(self, submission: str, argv: Sequence[str]) -> None:
        """Start a program beside the cluster's head, with the backend's environment; returns once it is accepted.

        Submitting the same ``submission`` twice starts it once.
        """
        ...

    def status(self, submission: str) -> JobStatus | None:
        """How it stands now; None if this cluster has never heard of it."""
        ...

    def follow(self, submission: str) -> Iterator[str]:
        """Every line that the program prints, from its first, until it ends; blocks between lines.

        A connection that breaks is made again and nothing is repeated. The end of the lines says nothing about the
        result.
        """
        ...

    def stop(self, submission: str) -> None:
        """Ask the program to end and return at once; one that has ended already is left as it is."""
        ...


class Backend(ABC):
    """A source of one Ray cluster; a context manager that closes it."""

    name: str
    python: str = sys.executable
    """The interpreter that has the trainer, where the run's program starts."""
    token_file: Path | None = None
    """Where the cluster's token lies, for those who may read it; None if it has none."""
    namespace: str | None = None
    context: str | None = None
    """Where on Kubernetes, from ``start`` on."""
    outlives: bool = False
    """Whether a run that was accepted goes on without the launcher, and keeps its own log."""

    def check(self) -> Iterator[UtaforgeError]:
        """What stands in the way of a start, as far as it can be told beforehand; all of it."""
        yield from ()

    def manifests(self, run_url: str, attempt: int) -> list[dict[str, Any]]:
        """What attempt ``attempt`` of a run would send to a cluster; nothing where nothing is sent."""
        return []

    def submission(self, run_url: str, attempt: int) -> str:
        """The name under which attempt ``attempt`` of a run is submitted."""
        return f"{run_url.rsplit('/', 1)[-1]}-{attempt}"

    @abstractmethod
    def start(self, say: Say) -> Jobs:
        """Bring the cluster up and wait until it takes jobs. Called once.

        Raises:
            ClusterError: it did not come up; nothing is left of it.
        """

    @abstractmethod
    def close(self) -> None:
        """End what ``start`` began, completely, and return when it is gone; at any time, any number of times."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

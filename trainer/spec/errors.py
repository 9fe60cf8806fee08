"""The one family of errors that people see: what is wrong, where, and what to do about it."""


class UtaforgeError(Exception):
    """Something a person can put right.

    Args:
        problem: what is wrong and where (the file, the URL, the field).
        cure: what to do about it, as an instruction.
    """

    exit_code = 1

    def __init__(self, problem: str, cure: str = "") -> None:
        super().__init__(problem, cure)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.cure}" if self.cure else self.problem


class JobError(UtaforgeError):
    """The job file cannot be used; lists every fault found in it."""

    exit_code = 2


class StoreError(UtaforgeError):
    """The object store refused, is out of reach, or holds something it should not."""

    exit_code = 3


class DataError(UtaforgeError):
    """Songs, shards or a dataset cannot be used."""

    exit_code = 4


class ClusterError(UtaforgeError):
    """A cluster could not be started, reached, or lost the run."""

    exit_code = 5


class TrainingError(UtaforgeError):
    """Training cannot go on, and trying again would not help (NaN, a wrong checkpoint, …)."""

    exit_code = 6

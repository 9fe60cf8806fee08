"""Submitting: a job becomes a run on a cluster, followed to its end."""

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.backends import open_backend
from launcher.backends.base import Backend, Jobs, JobStatus, Say
from launcher.down import tidy
from launcher.plan import Plan
from launcher.profiles import cores_here
from launcher.runs import Attempt, Chosen, Run
from trainer.spec import ClusterError, DataError, Job, StoreError, TrainingError, UtaforgeError
from trainer.store import open_store

log = logging.getLogger(__name__)
INTERRUPTED = 130
STOP_SECONDS = 20.0
_KINDS = {kind.exit_code: kind for kind in (UtaforgeError, StoreError, DataError, ClusterError, TrainingError)}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FROM_RANK = re.compile(r"^\((?:RayTrainWorker|run_rank_of) pid=\d+(?:, ip=[^)]+)?\) ?")
_OF_RAY = re.compile(
    r"^\s*\(\d\) raylet|^\(raylet|^\((?:\w+ )?pid="
    r"|^\s*\[?\d{4}-\d\d-\d\d[ T][\d:,.]+.*\.(?:py|cc):\d+|^\s*\[state-dump\]"
    r"|^Running entrypoint for job|^Setting up process group"
)


class Interrupted(UtaforgeError):
    """The run was stopped on somebody's wish."""

    exit_code = INTERRUPTED


@dataclass(frozen=True)
class Outcome:
    """A run that has its result.

    Attributes:
        run: the run.
        seconds: this submission took.
    """

    run: Run
    seconds: float


def home() -> Path:
    """What runs on this machine share (compiled operators, the local MLflow): ``UTAFORGE_HOME`` or ``./.utaforge``."""
    return Path(os.environ.get("UTAFORGE_HOME") or ".utaforge").resolve()


def environment(ranks: int) -> dict[str, str]:
    """Variables that the processes of a run need."""
    here = home()
    wanted = {
        "UTAFORGE_HOME": str(here),
        "TORCH_EXTENSIONS_DIR": str(here / "cache" / "torch_extensions"),
        "OMP_NUM_THREADS": str(max(1, cores_here() // ranks)),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def check(job: Job, planned: Plan) -> None:
    """Look for everything that stands in the way of ``job``, before anything is written or started.

    Raises:
        UtaforgeError: the one thing found, or a list of them, each with its cure.
    """
    with open_backend(job, planned, {}) as backend:
        found = [*_refusing(job.store), *backend.check()]
    if len(found) == 1:
        raise found[0]
    if found:
        listed = "\n".join(f"{number}. {error}".replace("\n", "\n   ") for number, error in enumerate(found, 1))
        raise ClusterError(f"{len(found)} things stand in the way of {job.name}:\n{listed}")


def submit(job: Job, planned: Plan, chosen: Chosen, say: Say) -> Outcome:
    """Run the chosen run on its cluster and follow it until it is over.

    Args:
        job: the job.
        planned: its plan.
        chosen: the run, from ``create_or_resume``.
        say: takes the lines of progress.

    Raises:
        UtaforgeError: what ended the run, with its own exit code.
        Interrupted: Ctrl-C here, or ``utaforge cancel``. A local run has ended then; on a cluster that outlives this
            process, Ctrl-C leaves it at work once it was accepted, and leaves nothing before.
    """
    started, run = time.monotonic(), chosen.run
    with open_backend(job, planned, environment(planned.ranks)) as backend:
        try:
            jobs = backend.start(say)
        except KeyboardInterrupt:
            raise _interrupted(run) from None
        see_through(run, backend, jobs, say)
    return Outcome(run, time.monotonic() - started)


def see_through(run: Run, backend: Backend, jobs: Jobs, say: Say) -> None:
    """Make one attempt at ``run`` on a cluster that is up; returns when the run has its result, else raises why not."""
    attempt = run.begin_attempt(backend, jobs)
    _hand_over(run, backend, jobs, attempt, say)
    _judge(run, attempt, _follow(run, backend, jobs, attempt, say))


class Reader:
    """Reads a run's log for people: without Ray's marks, and without what is about Ray alone."""

    def __init__(self) -> None:
        self._dead: set[str] = set()

    def __call__(self, line: str) -> str | None:
        """The line as people want it, or None if they do not.

        Once Ray says that a rank has failed, it repeats the traceback of what the run itself tells in plain words.
        """
        line = _COLOUR.sub("", line)
        rank = _FROM_RANK.match(line)
        plain = line[rank.end() :] if rank else line
        if rank and plain.startswith("Error in training function"):
            self._dead.add(rank[0])
        hidden = not plain.strip() or _OF_RAY.match(plain) or (rank and rank[0] in self._dead)
        return None if hidden else plain


def _refusing(store_url: str) -> Iterator[UtaforgeError]:
    try:
        open_store(store_url).check_writable()
    except StoreError as error:
        yield error


def _hand_over(run: Run, backend: Backend, jobs: Jobs, attempt: Attempt, say: Say) -> None:
    try:
        if backend.outlives:
            tidy(run)
        jobs.submit(attempt.submission, [backend.python, "-m", "trainer.driver", run.url])
        if backend.outlives:
            say(f"{backend.name} has it as {attempt.submission}; it goes on when this is closed")
    except (KeyboardInterrupt, UtaforgeError) as ended:
        if not _stop(jobs, attempt) and backend.outlives:
            raise _perhaps_accepted(run, attempt, ended) from None
        run.mark_stopped(attempt)
        if isinstance(ended, UtaforgeError):
            raise
        raise _interrupted(run) from None


def _follow(run: Run, backend: Backend, jobs: Jobs, attempt: Attempt, say: Say) -> JobStatus | None:
    told: list[str] = []
    try:
        _tell(jobs.follow(attempt.submission), told, say)
        return _last_status(jobs, attempt)
    except KeyboardInterrupt:
        if backend.outlives:
            raise _left(run) from None
        say("stopping the run")
        _stop(jobs, attempt)
        raise _interrupted(run) from None
    finally:
        if not backend.outlives:
            _store_log(run, told)


def _last_status(jobs: Jobs, attempt: Attempt) -> JobStatus | None:
    """The status, asked for again if the connection breaks: it decides how the run ended."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            return jobs.status(attempt.submission)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _tell(lines: Iterable[str], told: list[str], say: Say) -> None:
    everything = bool(os.environ.get("UTAFORGE_DEBUG"))
    readable = Reader()
    for line in lines:
        told.append(line)
        shown = line if everything else readable(line)
        if shown is not None:
            say(shown)


def _stop(jobs: Jobs, attempt: Attempt) -> bool:
    """Give the run a chance to end by itself (closing a local cluster ends it anyway).

    Returns:
        Whether its cluster was told, or has never heard of it.
    """
    told = False
    with suppress(ClusterError, KeyboardInterrupt):
        jobs.stop(attempt.submission)
        told = True
    with suppress(ClusterError, KeyboardInterrupt):
        deadline = time.monotonic() + STOP_SECONDS
        while (status := jobs.status(attempt.submission)) and told and not status.over and time.monotonic() < deadline:
            time.sleep(0.2)
        told = told or status is None
    return told


def _store_log(run: Run, told: list[str]) -> None:
    try:
        before = run.store.get_or_none("logs/driver.log") or b""
        run.store.put("logs/driver.log", before + "\n".join([*told, ""]).encode())
    except StoreError as error:
        log.warning("the log was not stored: %s", error.problem)


def _judge(run: Run, attempt: Attempt, status: JobStatus | None) -> None:
    """Raise what ended the run, unless it has its result. The status decides; the run directory says why."""
    if (status and status.state == "stopped") or (status is None and run.was_stopped(attempt)):
        raise _interrupted(run)
    if status is None and run.finished:  # it was tidied away before it was asked about
        return
    if status and status.state == "succeeded":
        if not run.finished:
            raise ClusterError(
                f"run {run.name} ended without a result", f"see utaforge logs {run.name}; then submit again"
            )
        return
    failure = run.failure(attempt)
    if failure:
        error = _KINDS.get(failure.get("exit_code", TrainingError.exit_code), TrainingError)
        raise error(str(failure["problem"]), str(failure["cure"]))
    reason = status.message.partition(", last available logs")[0].strip() if status else "its cluster has lost it"
    raise ClusterError(
        f"run {run.name} failed: {reason}",
        f"see utaforge why {run.name}; submitting again continues at step {run.newest_commit()}",
    )


def _left(run: Run) -> Interrupted:
    return Interrupted(
        f"run {run.name} goes on without you",
        f"follow it: utaforge logs -f {run.name}; end it: utaforge cancel {run.name}",
    )


def _perhaps_accepted(run: Run, attempt: Attempt, ended: BaseException) -> UtaforgeError:
    """For a submission that could neither be handed over nor taken back: the next one must not start it twice."""
    kind, before = (ClusterError, f"{ended.problem}\n") if isinstance(ended, UtaforgeError) else (Interrupted, "")
    cure = f"ask once the cluster answers: utaforge status {run.name}; end it: utaforge cancel {run.name}"
    return kind(f"{before}run {run.name} may have been accepted nevertheless, as {attempt.submission}", cure)


def _interrupted(run: Run) -> Interrupted:
    step = run.newest_commit()
    where = f"at its last checkpoint, step {step}" if step else "from the beginning, since it had no checkpoint yet"
    return Interrupted(f"run {run.name} was stopped", f"submit the same job again: it continues {where}")

"""Runs: their names, and how they stand, from the run directory and the backend. There is no other book."""

import getpass
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from launcher.backends.base import Backend, Jobs, JobStatus
from launcher.backends.ray_jobs import RayJobs
from launcher.differences import differences
from trainer.spec import Job, dump_job, job_from_json
from trainer.spec.errors import ClusterError, JobError, StoreError
from trainer.store import Entry, Store, open_store

if TYPE_CHECKING:
    from launcher.backends.kubernetes import KubernetesJobs

State = Literal["finished", "running", "failed", "stopped"]
ANSWER_SECONDS = 3.0
"""How long a cluster is waited for when only its state is wanted."""
STOP_SECONDS = 60.0
READERS = 32
"""Requests at once: a list of runs waits for the store, not for this machine."""
TAIL_BYTES = 1 << 16
_ATTEMPTS, _COMMITS, _JOURNAL = "attempts", "checkpoints", "metrics.jsonl"
_RESULT, _FAILURE = "result.json", "failure.json"
_TOLD = {"steps", "loss", "attempt", "backend", "time"}
"""What a result says for a list of runs; those of earlier versions do not."""
_RUN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Busy(ClusterError):
    """Somebody else is at work on it."""

    exit_code = 12


@dataclass(frozen=True)
class Attempt:
    """One submission of a run, as ``attempts/NNNN.json`` tells it.

    Attributes:
        number: from 1.
        time: when, seconds since 1970.
        host: of the launcher.
        user: who.
        backend: name of it.
        address: the cluster's dashboard; on Kubernetes, its API server.
        submission: the program's name there.
        token_file: where the cluster's token lies on ``host``; the token itself is written nowhere else.
        namespace: on Kubernetes.
        context: of the kubeconfig, likewise; None for its current one.
        stopped: on somebody's wish.
    """

    number: int
    time: float
    host: str
    user: str
    backend: str
    address: str
    submission: str
    token_file: str | None = None
    namespace: str | None = None
    context: str | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        name: of the run.
        url: its run directory.
        state: finished, running, failed or stopped; a stopped run goes on where it was when it is submitted again.
        step: optimizer steps done, as far as the journal or, in a run that is not running, the newest checkpoint tells.
        steps: that the job asks for.
        loss: the last one recorded.
        attempts: submissions so far.
        backend: of the newest attempt.
        problem: why it failed.
        cure: what to do about that.
        updated: when anything was last heard of it, ISO 8601.
    """

    name: str
    url: str
    state: State
    step: int
    steps: int
    loss: float | None
    attempts: int
    backend: str | None
    problem: str | None
    cure: str | None
    updated: str | None

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        return self.state if self.state == "finished" else f"{self.state} at step {self.step} of {self.steps}"


class NoRun(StoreError):
    """What was taken for a run directory is none."""


class Run:
    """One run directory.

    Args:
        store: ``<store>/runs/<run>``.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        self.name = store.url.rsplit("/", 1)[-1]

    @cached_property
    def job(self) -> Job:
        """The resolved job; raises ``StoreError`` if there is no such run."""
        return job_from_json(self.store.get("job.json").decode())

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.store.exists(_RESULT)

    @property
    def result(self) -> dict[str, Any] | None:
        """What it came to, once finished."""
        return _json(self.store.get_or_none(_RESULT))

    def attempts(self) -> int:
        """Submissions so far."""
        return sum(1 for _ in self.store.list(_ATTEMPTS))

    def newest_attempt(self) -> Attempt | None:
        """The last submission, or None if there was none."""
        return self._attempt({entry.path: entry for entry in self.store.list(_ATTEMPTS)})

    def every_attempt(self) -> list[Attempt]:
        """All submissions, from the first."""
        return [Attempt(**json.loads(self.store.get(entry.path))) for entry in self.store.list(_ATTEMPTS)]

    def at_work(self) -> Attempt | None:
        """The submission that is at work now; None if there is none."""
        attempt, running = self._newest()
        return attempt if running else None

    def newest_commit(self) -> int:
        """Step of the newest checkpoint that is whole; 0 without one."""
        return _newest_commit({entry.path: entry for entry in self.store.list(_COMMITS)})

    def begin_attempt(self, backend: Backend, jobs: Jobs) -> Attempt:
        """Claim this run for a submission to ``jobs``, which is to be made under ``Attempt.submission``.

        Raises:
            Busy: somebody else has claimed it, perhaps at the same moment.
        """
        newest = self.refuse_if_running()
        number = newest.number + 1 if newest else 1
        attempt = Attempt(
            number,
            time.time(),
            socket.gethostname(),
            getpass.getuser(),
            backend.name,
            jobs.address,
            backend.submission(self.url, number),
            str(backend.token_file) if backend.token_file else None,
            backend.namespace,
            backend.context,
        )
        if not self.store.create(_path(attempt), _dumped(attempt)):
            raise _busy(self.name, "started by another submit this very moment")
        return attempt

    def mark_stopped(self, attempt: Attempt) -> None:
        """Note that ``attempt`` was stopped on somebody's wish."""
        self.store.put(_path(attempt), _dumped(replace(attempt, stopped=True)))

    def was_stopped(self, attempt: Attempt) -> bool:
        """Whether somebody, anywhere, has stopped ``attempt``."""
        return bool(json.loads(self.store.get(_path(attempt))).get("stopped"))

    def refuse_if_running(self) -> Attempt | None:
        """The newest attempt, which has ended; raises ``Busy`` if it is at work: never two at once."""
        attempt, running = self._newest()
        if attempt and running:
            raise _busy(self.name, f"on {attempt.host} since {_clock(attempt.time)} (attempt {attempt.number})")
        return attempt

    def files(self) -> dict[str, Entry]:
        """Everything that is stored of it, by path: one request."""
        return {entry.path: entry for entry in self.store.list()}

    def status(self, ask: "Callable[[Attempt], JobStatus | None] | None" = None) -> Status:
        """How it stands, from what is stored and what its cluster says.

        Args:
            ask: how the program of an attempt stands, if its cluster was asked already.

        Raises:
            NoRun: it is a folder without a job.
        """
        if (result := self.result) and result.keys() >= _TOLD:
            return self._finished(result)
        files = self.files()
        if "job.json" not in files:
            raise NoRun(f"{self.url} is no run: it has no job.json", "see utaforge list")
        attempt, job = self._attempt(files), json.loads(self.store.get("job.json"))
        step, loss, heard = self._last_metrics(files.get(_JOURNAL))
        failure = self.failure(attempt) if _FAILURE in files and _RESULT not in files else None
        state: State = "stopped"
        if _RESULT in files:
            state, step = "finished", job["train"]["steps"]
        elif failure:
            state = "failed"
        elif attempt:
            state = self._state(attempt, files, ask or self.ask)
        if state in ("failed", "stopped"):
            step = _newest_commit(files)
        heard = max(heard, attempt.time if attempt else 0.0)
        return Status(
            name=self.name,
            url=self.url,
            state=state,
            step=step,
            steps=job["train"]["steps"],
            loss=loss,
            attempts=attempt.number if attempt else 0,
            backend=attempt.backend if attempt else None,
            problem=failure["problem"] if failure else "its program failed" if state == "failed" else None,
            cure=failure["cure"] if failure else f"see utaforge why {self.name}" if state == "failed" else None,
            updated=_clock(heard) if heard else None,
        )

    def now(self) -> float:
        """The store's clock, by which it says when files were written; this machine's where it may not be asked."""
        try:
            return self.store.now()
        except StoreError:
            return time.time()

    def cancel(self) -> None:
        """Ask the run to stop, and wait until it has.

        Raises:
            ClusterError: it is not running, or it runs where this machine cannot reach it, or it would not stop.
        """
        attempt = self.at_work()
        if attempt is None:
            raise ClusterError(f"run {self.name} is not running: it is {self.status()}", "there is nothing to cancel")
        if attempt.backend == "local" and attempt.host != socket.gethostname():
            raise ClusterError(
                f"run {self.name} runs on {attempt.host}", f"cancel it there: utaforge cancel {self.name}"
            )
        jobs = self._jobs(attempt)
        jobs.stop(attempt.submission)
        deadline = time.monotonic() + STOP_SECONDS
        while (status := jobs.status(attempt.submission)) and not status.over:
            if time.monotonic() > deadline:
                raise ClusterError(f"run {self.name} does not stop", _ended_by_hand(attempt))
            time.sleep(0.2)
        self.mark_stopped(attempt)

    def live_log(self) -> Iterator[str] | None:
        """Lines of the attempt at work, as they come, from its first; None if the run is not running within reach."""
        attempt = self.at_work()
        if attempt is None or not _reachable(attempt):
            return None
        return self._jobs(attempt).follow(attempt.submission)

    def stored_logs(self) -> dict[str, str]:
        """Log files of the run directory, by name."""
        return {
            entry.path.removeprefix("logs/"): self.store.get(entry.path).decode("utf-8", "replace")
            for entry in self.store.list("logs")
        }

    def ask(self, attempt: Attempt) -> JobStatus | None:
        """How the program of ``attempt`` stands, from its cluster; None if that has never heard of it."""
        return self._jobs(attempt).status(attempt.submission)

    def _finished(self, result: Mapping[str, Any]) -> Status:
        return Status(
            name=self.name,
            url=self.url,
            state="finished",
            step=result["steps"],
            steps=result["steps"],
            loss=result["loss"],
            attempts=result["attempt"],
            backend=result["backend"],
            problem=None,
            cure=None,
            updated=_clock(result["time"]),
        )

    def _newest(self) -> tuple[Attempt | None, bool]:
        """The newest attempt, and whether that very one is at work."""
        files = self.files()
        attempt = self._attempt(files)
        return attempt, attempt is not None and self._state(attempt, files, self.ask) == "running"

    def _state(self, attempt: Attempt, files: Mapping[str, Entry], ask: Callable[[Attempt], JobStatus | None]) -> State:
        """How an attempt stands that has left neither a result nor a failure: its cluster knows, or silence tells."""
        if _RESULT in files or attempt.stopped:
            return "stopped"
        journal = files.get(_JOURNAL)
        begun = files[_path(attempt)].modified  # attempt.time is by the clock of whoever submitted it
        heard = max(begun, journal.modified if journal else 0.0)
        if _reachable(attempt):
            try:
                status = ask(attempt)
            except ClusterError:
                if attempt.backend == "local":
                    return "stopped"
            else:
                if status:
                    return "failed" if status.state == "failed" else "stopped" if status.over else "running"
                heard = begun  # it may be about to be submitted
        return "stopped" if self._silent_since(heard) else "running"

    def _silent_since(self, heard: float) -> bool:
        """Whether it has been silent for so long that it counts as ended."""
        long_ago = time.time() - heard > _SILENT_SECONDS + _SKEW_SECONDS
        return long_ago or self.now() - heard >= _SILENT_SECONDS

    def _attempt(self, files: Mapping[str, Entry]) -> Attempt | None:
        newest = max((path for path in files if path.startswith(f"{_ATTEMPTS}/")), default=None)
        return Attempt(**json.loads(self.store.get(newest))) if newest else None

    def _last_metrics(self, journal: Entry | None) -> tuple[int, float | None, float]:
        """Of the journal's end; of all of it only where the end tells no loss."""
        if journal is None:
            return 0, None, 0.0
        begin = max(0, journal.bytes - TAIL_BYTES)
        found = _last_metrics(self.store.part(journal.path, begin, journal.bytes) if journal.bytes else b"")
        return found if found[1] is not None or not begin else _last_metrics(self.store.get(journal.path))

    def _jobs(self, attempt: Attempt) -> Jobs:
        if attempt.backend == "kubernetes":
            return kubernetes_jobs(attempt)
        token = None
        if attempt.token_file and os.access(attempt.token_file, os.R_OK):
            token = Path(attempt.token_file).read_text()
        return RayJobs(attempt.address, token, ANSWER_SECONDS)

    def failure(self, attempt: Attempt | None) -> dict[str, Any] | None:
        """Why ``attempt`` cannot go on, if its trainer has said so."""
        failure = _json(self.store.get_or_none(_FAILURE))
        return failure if failure and attempt and failure["attempt"] == attempt.number else None


_SILENT_SECONDS = 120.0
"""A run that cannot be asked about and that has been silent for so long counts as ended."""
_SKEW_SECONDS = 3600.0
"""By how much this machine's clock may be wrong; S3 refuses one that is 15 minutes off."""


@dataclass(frozen=True)
class Chosen:
    """The run that a submission works on.

    Attributes:
        run: the run.
        news: what people should know about the choice, in a sentence.
    """

    run: Run
    news: str


def runs_of(store_url: str) -> Store:
    """Where a store keeps its runs."""
    return open_store(store_url).at("runs")


def find_run(store_url: str, name: str) -> Run:
    """The run called ``name``.

    Raises:
        StoreError: there is none; names the runs that there are.
    """
    place = runs_of(store_url)
    if _RUN_NAME.fullmatch(name):
        run = Run(place.at(name))
        if run.store.exists("job.json"):
            return run
    names = place.folders()
    known = f"; there are: {', '.join(names[-10:])}" if names else ""
    raise StoreError(
        f"there is no run {name!r} in {store_url}{known}", "see utaforge list; --store URL names another store"
    )


def create_or_resume(job: Job, plan: Mapping[str, Any], name: str | None = None) -> Chosen:
    """The run that submitting ``job`` means: its newest unfinished one, or a new one.

    The first run is called like the job, later ones ``-2``, ``-3``, …; ``name`` chooses another. The run directory then
    holds ``job.json`` and ``plan.json`` as they are now.

    Raises:
        JobError: the run was made from another job (names the fields), or ``name`` is finished or cannot be a name.
        Busy: the run is at work at this moment.
    """
    place = runs_of(job.store)
    run, news = _named(place, job, name) if name else _next(place, job)
    run.refuse_if_running()
    dumped = dump_job(job).encode()
    if not run.store.create("job.json", dumped):
        if differing := differences(run.job, job):
            raise _other_job(run.name, differing)
        run.store.put("job.json", dumped)
    run.store.put("plan.json", json.dumps(plan, ensure_ascii=False, indent=1).encode())
    return Chosen(Run(run.store), news)


def _named(place: Store, job: Job, name: str) -> tuple[Run, str]:
    if not _RUN_NAME.fullmatch(name):
        raise JobError(
            f"--run {name}: a run's name has 1 to 63 characters of a-z, 0-9 and '-'", f"try --run {job.name}-2"
        )
    run = Run(place.at(name))
    if not run.store.exists("job.json"):
        return run, f"run {name}: new"
    if run.finished:
        raise JobError(
            f"--run {name}: this run is finished", f"leave --run out to start a new one, or see utaforge status {name}"
        )
    return run, _going_on(run)


def _next(place: Store, job: Job) -> tuple[Run, str]:
    """The newest unfinished run of this job, else the next free name; neither if the newest waits for another job."""
    runs = runs_of_job(place, job.name)
    differing: list[str] = []
    for number in sorted(runs, reverse=True):
        run = runs[number]
        if run.finished:
            continue
        found = differences(run.job, job)
        if not found:
            return run, _going_on(run)
        if number == max(runs):
            differing = found
    if differing:
        raise _other_job(runs[max(runs)].name, differing)
    name = free_name(job.name, runs)
    before = f" ({runs[max(runs)].name} is finished)" if runs else ""
    return Run(place.at(name)), f"run {name}: new{before}"


def free_name(job_name: str, runs: Mapping[int, Run]) -> str:
    """The name of the next run of a job that has ``runs`` by number."""
    number = max(runs, default=0) + 1
    return job_name if number == 1 else f"{job_name}-{number}"


def runs_of_job(place: Store, job_name: str) -> dict[int, Run]:
    """Runs of the job ``job_name`` in ``place`` that are called like it or like it with a number: number → run."""
    found: dict[int, Run] = {}
    for name in place.folders():
        match = re.fullmatch(rf"{re.escape(job_name)}(?:-([1-9]\d*))?", name)
        if match and (run := Run(place.at(name))).store.exists("job.json") and run.job.name == job_name:
            found[int(match[1] or 1)] = run
    return found


def _going_on(run: Run) -> str:
    step = run.newest_commit()
    return (
        f"run {run.name}: continues at step {step}" if step else f"run {run.name}: starts again, it had no checkpoint"
    )


def _other_job(name: str, differing: list[str]) -> JobError:
    return JobError(
        f"run {name} was made from another job; these fields differ:\n" + "\n".join(f"  {line}" for line in differing),
        "put them back to continue it, or start a new run: --run NEW-NAME",
    )


def _busy(name: str, where: str) -> Busy:
    return Busy(
        f"run {name} is at work already, {where}",
        f"wait for it (utaforge logs -f {name}), stop it (utaforge cancel {name}), or start another: --run NEW-NAME",
    )


def _ended_by_hand(attempt: Attempt) -> str:
    """What ends an attempt that does not mind being asked."""
    if attempt.backend != "kubernetes":
        return "end its submit with Ctrl-C"
    return (
        f"see kubectl -n {attempt.namespace} describe rayjob {attempt.submission}: KubeRay has to take it away, so see "
        "that its operator runs; then cancel again"
    )


def _reachable(attempt: Attempt) -> bool:
    return attempt.backend != "local" or attempt.host == socket.gethostname()


def kubernetes_jobs(attempt: Attempt) -> "KubernetesJobs":
    """The jobs of the namespace that an attempt was submitted to."""
    from launcher.backends.kubernetes import ANSWER_SECONDS as PATIENCE
    from launcher.backends.kubernetes import KubernetesJobs
    from launcher.backends.kubernetes_api import Api

    return KubernetesJobs(attempt.namespace or "", Api(attempt.context, PATIENCE))


def _newest_commit(files: Mapping[str, Entry]) -> int:
    manifests = (re.fullmatch(rf"{_COMMITS}/step-(\d+)/manifest\.json", path) for path in files)
    return max((int(match[1]) for match in manifests if match), default=0)


def _path(attempt: Attempt) -> str:
    return f"{_ATTEMPTS}/{attempt.number:04d}.json"


def _dumped(attempt: Attempt) -> bytes:
    return json.dumps(asdict(attempt), indent=1).encode()


def _json(data: bytes | None) -> dict[str, Any] | None:
    return cast("dict[str, Any]", json.loads(data)) if data else None


def _last_metrics(journal: bytes | None) -> tuple[int, float | None, float]:
    """(step, last training loss, time) of the end of a journal; its last line may be torn."""
    step, heard = 0, 0.0
    for line in reversed((journal or b"").splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step, heard = max(step, entry["step"]), max(heard, entry["time"])
        loss = entry.get("metrics", {}).get("train/loss")
        if loss is not None:
            return step, (float(loss) if math.isfinite(float(loss)) else None), heard
    return step, None, heard


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

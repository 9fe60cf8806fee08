"""Metrics: first into a journal of our own, from there to MLflow, in a process of its own.

The journal is one JSON object a line, in order: ``{"step", "time", "metrics": {…}}``, ``{"step", "time", "artifact":
path in the run directory}`` and, last, ``{"step", "time", "end": "FINISHED" | "FAILED" | "KILLED"}``. Rank 0 appends to
a local file (microseconds); the store's ``metrics.jsonl`` mirrors it. Values that JSON has no numbers for are the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which Python's ``float`` reads.

``python -m trainer.tracking RUN_URL --follow JOURNAL`` replays the journal while it grows, at low priority: neither
MLflow's import nor a dead server costs a training step anything. ``python -m trainer.tracking RUN_URL`` replays the
store's copy later. A metric is told once per (key, step), whatever was killed in between: MLflow itself is asked how
far each key has got.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from trainer.mirror import Mirror
from trainer.registry import mirror
from trainer.rundir import RunDirectory
from trainer.spec import Job, job_from_json, reveal
from trainer.spec.errors import StoreError, UtaforgeError
from trainer.store import Store, open_store

log = logging.getLogger(__name__)
JOURNAL = "metrics.jsonl"
MLFLOW = "mlflow.json"
DRAIN_SECONDS = 30.0
POLL_SECONDS = 2.0
"""Between two requests: a server with passwords hashes them two to four times for each: 0.4 s of a core."""
LONGEST_PAUSE = 10.0
SYNC_PAUSES = (2.0, 5.0)
End = Literal["FINISHED", "FAILED", "KILLED"]


class Journal:
    """The metrics of a run, written by rank 0. Appending raises ``StoreError`` if the local disk is full.

    Args:
        store: the run directory.
        path: local file; what it held is replaced.
        step: the commit that the run goes on from: the store's entries up to it stay, later ones are dropped, since
            those steps come again. 0: from the beginning.
    """

    def __init__(self, store: Store, path: Path, step: int = 0) -> None:
        self.path = path
        entries = read(store) if step else []
        path.write_bytes(b"".join(_line(one) for one in entries if one["step"] <= step and "end" not in one))
        self._file = path.open("ab", buffering=0)
        self.mirror = Mirror(store, JOURNAL, path)
        """The store's copy; ``mirror.now`` is called before a checkpoint is committed."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append metrics. A key has one value a step: the first one given is the one that MLflow gets."""
        values = {key: float(value) for key, value in metrics.items()}
        self._append({"step": step, "time": time.time(), "metrics": values})

    def artifact(self, step: int, path: str) -> None:
        """Append a file of the run directory (in the store already) that MLflow shall show."""
        self._append({"step": step, "time": time.time(), "artifact": path})

    def last(self, key: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        for line in reversed(self.path.read_bytes().splitlines()):
            value = json.loads(line).get("metrics", {}).get(key)
            if value is not None:
                return float(value)
        return None

    def close(self, step: int, end: End) -> None:
        """Append how this attempt ended and mirror a last time; raises ``StoreError`` if the store refuses."""
        self._append({"step": step, "time": time.time(), "end": end})
        self._file.close()
        self.mirror.close()

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(_line(entry))
        except OSError as error:
            raise StoreError(
                f"the journal {self.path} cannot be written: {error.strerror}", "free disk space"
            ) from error


class Follower:
    """The process that replays a journal to MLflow while it is written.

    Args:
        run_url: the run directory.
        journal: its local file.
        drain_seconds: how long ``close`` waits at most.
    """

    def __init__(self, run_url: str, journal: Path, drain_seconds: float = DRAIN_SECONDS) -> None:
        self._run_url = run_url
        self._drain_seconds = drain_seconds
        command = [sys.executable, "-m", "trainer.tracking", run_url, "--follow", str(journal)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def close(self) -> bool:
        """Wait, at most ``drain_seconds``, until MLflow has everything (close the journal first).

        Returns:
            Whether it has. If not, one line says where the metrics are and how to replay them.
        """
        try:
            delivered = self._process.wait(self._drain_seconds) == 0
        except subprocess.TimeoutExpired:
            delivered = False
            self._process.kill()
            self._process.wait()
        if not delivered:
            name = self._run_url.rstrip("/").rsplit("/", 1)[-1]
            kept = f"{self._run_url}/{JOURNAL}"
            log.warning(
                "MLflow lacks the last metrics; all are kept in %s: replay them with `utaforge sync %s`", kept, name
            )
        return delivered


class SystemMetrics:
    """CPU, memory and GPUs of this machine, looked at no more often than every ``seconds``."""

    def __init__(self, seconds: float = 5.0) -> None:
        import psutil

        self._psutil = psutil
        self._seconds = seconds
        self._last = -math.inf
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        """What is in use now; empty if the last look is less than ``seconds`` ago.

        Returns:
            ``system/cpu_percent``, ``system/memory_gib``, ``system/gpu0_utilisation`` (percent),
            ``system/gpu0_memory_gib``, ….
        """
        now = time.monotonic()
        if now - self._last < self._seconds:
            return {}
        self._last = now
        metrics = {
            "system/cpu_percent": self._psutil.cpu_percent(),
            "system/memory_gib": self._psutil.virtual_memory().used / 2**30,
        }
        for index, (utilisation, used) in enumerate(_gpus()):
            metrics[f"system/gpu{index}_utilisation"] = utilisation
            metrics[f"system/gpu{index}_memory_gib"] = used / 2**30
        return metrics


def read(store: Store) -> Iterator[dict[str, Any]]:
    """The entries of the store's journal, in order; none if there is no journal."""
    for line in (store.get_or_none(JOURNAL) or b"").splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def sync(run_url: str) -> None:
    """Replay the store's journal of a run that is over; raises ``UtaforgeError`` if MLflow stays out of reach."""
    replay = Replay(run_url)
    for pause in (*SYNC_PAUSES, None):
        try:
            if not replay.deliver(list(read(replay.store))):
                replay.interrupted()
            replay.mirror_champion()
            return
        except _outages() as error:
            if pause is None:
                raise UtaforgeError(
                    f"MLflow at {_public(replay.uri)} is out of reach: {_brief(error)}",
                    "start it, or correct tracking.mlflow, and sync again",
                ) from error
            time.sleep(pause)


def follow(run_url: str, journal: Path, parent: int) -> bool:
    """Replay ``journal`` while it grows, until its end entry or until process ``parent`` is gone.

    Returns:
        Whether MLflow has all of it.
    """
    replay, offset, pause, next_try = Replay(run_url), 0, POLL_SECONDS, 0.0
    while True:
        orphaned = os.getppid() != parent
        if orphaned or time.monotonic() >= next_try:
            try:
                for entries, offset_after in _batches(journal, offset):
                    ended = replay.deliver(entries)
                    offset = offset_after
                    if ended:
                        return True
                if orphaned:
                    replay.interrupted()
                    return True
                if pause > POLL_SECONDS:
                    log.info("MLflow is within reach again")
                pause = POLL_SECONDS
            except _outages() as error:
                if pause == POLL_SECONDS:
                    log.warning("MLflow at %s is out of reach, trying on: %s", _public(replay.uri), _brief(error))
                pause = min(2 * pause, LONGEST_PAUSE)
                next_try = time.monotonic() + pause
        if orphaned:
            return False
        time.sleep(POLL_SECONDS)


class Replay:
    """One run directory's MLflow run: found or made when first needed, told what it does not know yet.

    Any failure raises MLflow's own error; the next call then connects afresh and asks MLflow how far it is.

    Args:
        run_url: the run directory.
    """

    def __init__(self, run_url: str) -> None:
        self.store = open_store(run_url)
        self.job: Job = job_from_json(self.store.get("job.json").decode())
        self.uri: str = self.job.tracking.mlflow or f"sqlite:///{_home() / 'mlflow.db'}"
        self._run_url = run_url.rstrip("/")
        self._run_id: str | None = None
        self._steps: dict[str, int] = {}
        self._artifacts: dict[str, set[str]] = {}

    def deliver(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Tell MLflow what is new in ``entries``; returns whether the journal's end was among them."""
        run_id, self._run_id = self._run_id or self._connect(), None
        self._deliver(run_id, entries)
        self._run_id = run_id
        return any("end" in entry for entry in entries)

    def interrupted(self) -> None:
        """Say that the run was cut off without a word."""
        self._client.set_terminated(self._run_id or self._connect(), "KILLED")

    def mirror_champion(self) -> None:
        """Tell the model registry whether this run is its job's champion."""
        mirror(self._client, self._run_id or self._connect(), RunDirectory(self._run_url))

    @functools.cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        if self.job.tracking.username:
            os.environ["MLFLOW_TRACKING_USERNAME"] = self.job.tracking.username
        if self.job.tracking.password:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = reveal(self.job.tracking.password)
        return MlflowClient(self.uri)

    def _deliver(self, run_id: str, entries: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        fresh: list[Metric] = []
        for entry in entries:
            for key, value in entry.get("metrics", {}).items():
                if entry["step"] > self._steps.get(key, -1):
                    self._steps[key] = entry["step"]
                    fresh.append(Metric(key, float(value), round(1000 * entry["time"]), entry["step"]))
        for start in range(0, len(fresh), 1000):
            self._client.log_batch(run_id, metrics=fresh[start : start + 1000])
        for entry in entries:
            if "artifact" in entry:
                self._show(run_id, entry["artifact"])
            if "end" in entry:
                self._client.set_terminated(run_id, entry["end"], round(1000 * entry["time"]))

    def _show(self, run_id: str, path: str) -> None:
        folder, _, name = path.rpartition("/")
        if folder not in self._artifacts:
            self._artifacts[folder] = {info.path for info in self._client.list_artifacts(run_id, folder or None)}
        if path in self._artifacts[folder]:
            return
        content = self.store.get_or_none(path)
        if content is None:
            log.warning("%s/%s is gone, MLflow does not get it", self._run_url, path)
            return
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / name
            local.write_bytes(content)
            self._client.log_artifact(run_id, str(local), folder or None)
        self._artifacts[folder].add(path)

    def _connect(self) -> str:
        with _one_migration_at_a_time(self.uri):
            experiment = self._experiment()
        key = self._key()
        found = self._client.search_runs([experiment], f"tags.`utaforge.key` = '{key}'", max_results=1)
        if found:
            run = found[0]
        else:
            tags = {"utaforge.key": key, "utaforge.run": self._run_url, **_versions()}
            run = self._client.create_run(experiment, tags=tags, run_name=self._run_url.rsplit("/", 1)[-1])
        run_id: str = run.info.run_id
        self._client.update_run(run_id, status="RUNNING")
        self._describe(run)
        self._steps = {metric.key: metric.step for metric in self._client.get_run(run_id).data.to_proto().metrics}
        self._artifacts = {}
        known = {"key": key, "run_id": run_id, "experiment_id": experiment, "uri": _public(self.uri)}
        self.store.put(MLFLOW, json.dumps(known).encode())
        return run_id

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.job.tracking.experiment or self.job.name
        known = self._client.get_experiment_by_name(name)
        if known:
            return known.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=_artifacts_beside(self.uri))
        except MlflowException:
            known = self._client.get_experiment_by_name(name)
            if known is None:
                raise
            return known.experiment_id

    def _key(self) -> str:
        """What makes this run directory this one, also if another run was made under the same URL before."""
        self.store.create(MLFLOW, json.dumps({"key": uuid.uuid4().hex, "run_id": None}).encode())
        return json.loads(self.store.get(MLFLOW))["key"]

    def _describe(self, run: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        job = json.loads(self.store.get("job.json"))
        job.setdefault("tracking", {})["mlflow"] = _public(self.uri)
        run_id = run.info.run_id
        params = [Param(key, value) for key, value in _flat(job) if key not in run.data.params and value]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        self._client.log_dict(run_id, job, "job.json")
        if plan := self.store.get_or_none("plan.json"):
            self._client.log_text(run_id, plan.decode(), "plan.json")
        pinned = self.store.get_or_none("data.json")
        if pinned is None or run.inputs.dataset_inputs:
            return
        training = json.loads(pinned)["train"]
        tags = [RunTag(f"utaforge.dataset.{i}", f"{one['url']} {one['digest']}") for i, one in enumerate(training)]
        self._client.log_batch(run_id, tags=tags)
        datasets = [Dataset(one["url"], one["digest"][:36], "utaforge", json.dumps(one)) for one in training]
        context = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, context) for dataset in datasets])


def main(argv: list[str] | None = None) -> int:
    """``RUN_URL [--follow JOURNAL]``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description="Replay a run's metrics to MLflow.")
    parser.add_argument("run", help="URL of the run directory")
    parser.add_argument("--follow", type=Path, metavar="JOURNAL", help="replay this file while it grows")
    args = parser.parse_args(argv)
    parent = os.getppid()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        with _only_one(args.run, patient=bool(args.follow)):
            if args.follow:
                os.nice(10)
                return 0 if follow(args.run, args.follow, parent) else 1
            sync(args.run)
            return 0
    except UtaforgeError as error:
        log.error("%s", error)
        return error.exit_code


def _line(entry: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
    except ValueError:
        metrics = {key: _finite_or_name(value) for key, value in entry["metrics"].items()}
        text = json.dumps({**entry, "metrics": metrics}, ensure_ascii=False)
    return text.encode() + b"\n"


def _finite_or_name(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _batches(journal: Path, offset: int, lines: int = 200) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Entries of whole lines after byte ``offset`` with the offset after them; first an empty batch, which connects."""
    yield [], offset
    with journal.open("rb") as file:
        while batch := whole_lines(file, offset, lines):
            offset += sum(map(len, batch))
            yield [json.loads(line) for line in batch], offset


def whole_lines(file: IO[bytes], offset: int, most: int) -> list[bytes]:
    """At most ``most`` lines after byte ``offset``, up to one that is still being written: that one is left."""
    file.seek(offset)
    return list(itertools.takewhile(lambda line: line.endswith(b"\n"), itertools.islice(file, most)))


@functools.cache
def _nvml() -> Any:
    """NVIDIA's management library, or None where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpus() -> list[tuple[float, float]]:
    """(utilisation in percent, bytes used) of each GPU."""
    nvml = _nvml()
    if nvml is None:
        return []
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu, nvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in gpus]


def _outages() -> tuple[type[Exception], ...]:
    """What is raised when something outside is wrong: by MLflow, requests (OSError), databases, our store, boto3."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (MlflowException, OSError, SQLAlchemyError, StoreError)
    return (MlflowException, OSError, SQLAlchemyError, StoreError, BotoCoreError, ClientError)


def _brief(error: Exception) -> str:
    told = error.problem if isinstance(error, UtaforgeError) else str(error)
    return told.splitlines()[0][:300] if told else type(error).__name__


def _home() -> Path:
    return Path(os.environ.get("UTAFORGE_HOME", ".utaforge")).absolute()


@contextlib.contextmanager
def _only_one(run_url: str, patient: bool) -> Iterator[None]:
    """Two processes of this machine never replay one run at once (a dying attempt's lives on for some seconds).

    Args:
        run_url: the run directory.
        patient: wait for the other one, rather than raise ``UtaforgeError``.
    """
    folder = Path(tempfile.gettempdir()) / f"utaforge-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / f"{hashlib.sha256(run_url.encode()).hexdigest()[:16]}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if patient else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UtaforgeError(f"{run_url} is being replayed already", "wait until the run has ended") from None
        yield


@contextlib.contextmanager
def _one_migration_at_a_time(uri: str) -> Iterator[None]:
    """MLflow makes the tables of an SQLite file at first contact; two processes at it make each other fail."""
    database = _sqlite_file(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.partition(":///")[2]).absolute() if uri.startswith("sqlite") else None


def _artifacts_beside(uri: str) -> str | None:
    """Where artifacts of an SQLite tracking store go; None: the server decides."""
    database = _sqlite_file(uri)
    return (database.parent / "mlartifacts").as_uri() if database else None


def _public(uri: str) -> str:
    """``uri`` without user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _versions() -> dict[str, str]:
    tags: dict[str, str] = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        tags["utaforge.version"] = metadata.version("utaforge")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        told = subprocess.run(command, capture_output=True, check=True, text=True, timeout=10)
        tags["mlflow.source.git.commit"] = told.stdout.strip()
    return tags


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested JSON as (``train.optimizer.lr``, text)."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield path, "" if value is None else str(value)
        return
    for key, child in children:
        yield from _flat(child, f"{path}.{key}" if path else str(key))


if __name__ == "__main__":
    sys.exit(main())

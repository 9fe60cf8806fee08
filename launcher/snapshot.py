"""Everything that is known of a run at one moment: its run directory and, on Kubernetes, its objects there."""

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from launcher.backends.base import JobStatus
from launcher.backends.kubernetes import standing
from launcher.backends.kubernetes_api import Api, Json
from launcher.render import inside
from launcher.render.rayjob import GROUP, PLURAL, SUBMISSION, VERSION
from launcher.runs import Attempt, Run, Status
from trainer.spec.errors import ClusterError
from trainer.store import Entry

LOG_BYTES = 1 << 16
LOG_LINES = 400
"""Of each log; Ray 2.60 alone writes 65 of a machine that is gone, and 255 of a rank that was killed for memory."""
ANSWER_SECONDS = 1.0
"""How long an API server that does not answer is tried again."""
T = TypeVar("T")


@dataclass(frozen=True)
class Log:
    """The end of a log file.

    Attributes:
        modified: when it last grew, seconds since 1970.
        lines: its last ones.
    """

    modified: float
    lines: list[str]


@dataclass(frozen=True)
class Objects:
    """What Kubernetes holds of one submission, as its API gives it.

    Attributes:
        rayjob: None if it is gone.
        clusters: its RayClusters.
        pods: of all of them, and the submitter's.
        events: about any of these, oldest first; Kubernetes forgets them after an hour.
        quotas: of the namespace.
        nodes: of the cluster, where a pod waits for one: their names, labels and taints.
        submitter: the last lines that the submitter said: the driver's, where the store refused them.
        unreachable: why the API server could not be asked.
        now: when it was asked, by its own clock, seconds since 1970.
    """

    rayjob: Json | None = None
    clusters: list[Json] = field(default_factory=list[Json])
    pods: list[Json] = field(default_factory=list[Json])
    events: list[Json] = field(default_factory=list[Json])
    quotas: list[Json] = field(default_factory=list[Json])
    nodes: list[Json] = field(default_factory=list[Json])
    submitter: list[str] = field(default_factory=list[str])
    unreachable: str | None = None
    now: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        now: the moment, seconds since 1970, by the clock of a server that was asked: this machine's may be wrong.
        status: how it stands.
        attempt: its newest submission.
        failure: what that one's trainer has reported.
        logs: ends of its log files, by name.
        journal: when the journal of metrics last grew; None without one.
        objects: on Kubernetes; None elsewhere.
    """

    now: float
    status: Status
    attempt: Attempt | None
    failure: dict[str, Any] | None
    logs: dict[str, Log]
    journal: float | None
    objects: Objects | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> "Snapshot":
        """From ``as_json``."""
        return cls(
            told["now"],
            Status(**told["status"]),
            Attempt(**told["attempt"]) if told["attempt"] else None,
            told["failure"],
            {name: Log(**log) for name, log in told["logs"].items()},
            told["journal"],
            Objects(**told["objects"]) if told["objects"] else None,
        )


def gather(run: Run) -> Snapshot:
    """Look at ``run`` from all sides at once.

    Raises:
        StoreError: there is no such run, or its store is out of reach.
    """
    files, attempt = run.files(), run.newest_attempt()
    on_kubernetes = attempt is not None and attempt.backend == "kubernetes"
    with ThreadPoolExecutor(8) as pool:
        objects = pool.submit(_objects, attempt) if attempt and on_kubernetes else None
        failure = pool.submit(run.failure, attempt)
        logs = {path: pool.submit(_log, run, files[path]) for path in files if path.startswith("logs/")}
        journal, seen = files.get("metrics.jsonl"), objects.result() if objects else None
        status = run.status((lambda _: _standing(seen)) if seen else None)
        return Snapshot(
            (seen and seen.now) or (run.now() if status.state == "running" else time.time()),
            status,
            attempt,
            failure.result(),
            {path.removeprefix("logs/"): log.result() for path, log in logs.items()},
            journal.modified if journal else None,
            seen,
        )


def _log(run: Run, entry: Entry) -> Log:
    end = run.store.part(entry.path, max(0, entry.bytes - LOG_BYTES), entry.bytes) if entry.bytes else b""
    return Log(entry.modified, end.decode("utf-8", "replace").splitlines()[-LOG_LINES:])


def _standing(objects: Objects) -> JobStatus | None:
    if objects.unreachable:
        raise ClusterError(objects.unreachable)
    return standing(objects.rayjob) if objects.rayjob else None


def _objects(attempt: Attempt) -> Objects:
    try:
        return observe(Api(attempt.context, ANSWER_SECONDS), attempt.namespace or "", attempt.submission)
    except ClusterError as error:
        return Objects(unreachable=error.problem)


def observe(api: Api, namespace: str, submission: str) -> Objects:
    """What ``namespace`` holds of ``submission``; what may not be looked at is left out."""
    core, ray = f"/api/v1/namespaces/{namespace}", f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}"
    rayjob = api.get(f"{ray}/{PLURAL}/{submission}")
    with ThreadPoolExecutor(4) as pool:
        clusters = pool.submit(
            _seen, lambda: api.list(f"{ray}/rayclusters", labelSelector=f"ray.io/originated-from-cr-name={submission}")
        )
        pods = pool.submit(_seen, lambda: api.list(f"{core}/pods", labelSelector=f"{SUBMISSION}={submission}"))
        events = pool.submit(_seen, lambda: api.list(f"{core}/events"))
        quotas = pool.submit(_seen, lambda: api.list(f"{core}/resourcequotas"))
        found = Objects(
            _lean(rayjob) if rayjob else None,
            [_lean(each) for each in clusters.result()],
            [_lean(each) for each in pods.result()],
            _own(events.result(), submission),
            [_lean(each) for each in quotas.result()],
            now=api.now,
        )
    if any(waits_for_node(pod) for pod in found.pods):
        found.nodes.extend(_node(each) for each in _seen(lambda: api.list("/api/v1/nodes")))
    found.submitter.extend(_submitter(api, core, found.pods))
    return found


def _seen(look: Callable[[], list[T]]) -> list[T]:
    try:
        return look()
    except ClusterError:
        return []


def _own(events: list[Json], submission: str) -> list[Json]:
    """Those about the submission's objects; KubeRay cuts long names at the front."""
    own = re.compile(rf"{'-'.join(submission.rsplit('-', 2)[1:])}(-|$)")
    mine = [_lean(each) for each in events if own.search(inside(each, "involvedObject", "name") or "")]
    return sorted(mine, key=when)


def when(event: Json) -> str:
    """When an event was last seen, ISO 8601."""
    series = inside(event, "series", "lastObservedTime")
    return str(series or event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])


def waits_for_node(pod: Json) -> str | None:
    """What the scheduler says of a pod that no node takes."""
    for condition in inside(pod, "status", "conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason"))
    return None


def _node(node: Json) -> Json:
    metadata = node["metadata"]
    return {
        "metadata": {"name": metadata["name"], "labels": metadata.get("labels") or {}},
        "spec": {"taints": inside(node, "spec", "taints") or []},
    }


def _submitter(api: Api, core: str, pods: list[Json]) -> list[str]:
    for pod in pods:
        if "ray.io/node-type" not in pod["metadata"]["labels"] and inside(pod, "status", "phase") != "Pending":
            name = pod["metadata"]["name"]
            return _seen(lambda name=name: api.text(f"{core}/pods/{name}/log", tailLines=str(LOG_LINES)).splitlines())
    return []


def _lean(thing: Json) -> Json:
    thing["metadata"].pop("managedFields", None)
    return thing

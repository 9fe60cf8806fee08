"""KubeRay: each submission of a run is a RayJob with a cluster of its own, which outlives the launcher."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from launcher.backends.base import Backend, JobStatus, Say
from launcher.backends.kubernetes_api import Api, Json, Refused
from launcher.overlay import Overlay
from launcher.plan import Plan
from launcher.render import inside
from launcher.render.rayjob import GROUP, PLURAL, RUN, SUBMISSION, VERSION, Manifest, Submission, manifests, object_name
from launcher.render.rules import broken_rules
from trainer.spec import ClusterError, Job, StoreError, UtaforgeError
from trainer.spec.cluster import Kubernetes
from trainer.spec.run import DRIVER_LOG, attempt_begins
from trainer.store import Store, open_store

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How often it is looked for what keeps pods from coming up."""
LOST_SECONDS = 600.0
"""How long the API server may be out of reach of somebody who follows a run; the run itself does not mind."""
REFUSED_SECONDS = 20.0
"""How long it has to refuse what it has given before: one that has just started knows nobody's rights yet."""
ANSWER_SECONDS = 3.0
"""How long a cluster is waited for when only its state is wanted."""
_COLLECTIONS = {
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
}
_UNHAPPY = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CrashLoopBackOff")


class KubernetesBackend(Backend):
    """A namespace of a Kubernetes with KubeRay.

    Args:
        job: the job; its ``cluster`` says where.
        plan: its plan.
    """

    name = "kubernetes"
    python = "python"
    outlives = True

    def __init__(self, job: Job, plan: Plan) -> None:
        assert isinstance(job.cluster, Kubernetes)
        self._job, self._plan, self._cluster = job, plan, job.cluster
        self._overlay = Overlay(self._cluster.code, job.store) if self._cluster.code else None
        self._api: Api | None = None

    def check(self) -> Iterator[UtaforgeError]:
        """See ``Backend``."""
        from launcher.backends.kubernetes_checks import checks

        made = self.manifests(open_store(self._job.store).at(f"runs/{self._job.name}").url, 1)
        try:
            self._api = Api(self._cluster.context)
            self._api.get("/version")
        except ClusterError as error:
            yield error
            return
        yield from checks(self._api, self._job, self._plan, made)

    def start(self, say: Say) -> "KubernetesJobs":
        """See ``Backend``; there is nothing to start before a job is there."""
        self._api = self._api or Api(self._cluster.context)
        self.namespace, self.context = self._cluster.namespace, self._api.context
        if self._overlay and self._overlay.upload():
            say(f"uploaded the code of {self._overlay.folder} as {self._overlay.url}")
        return KubernetesJobs(self._cluster.namespace, self._api, self._manifests)

    def close(self) -> None:
        """See ``Backend``: what was accepted goes on."""

    def submission(self, run_url: str, attempt: int) -> str:
        """See ``Backend``."""
        return object_name(run_url, attempt)

    def manifests(self, run_url: str, attempt: int) -> list[Manifest]:
        """What attempt ``attempt`` of a run sends."""
        argv = (self.python, "-m", "trainer.driver", run_url)
        return self._manifests(object_name(run_url, attempt), argv)

    def _manifests(self, name: str, argv: Sequence[str]) -> list[Manifest]:
        code = self._overlay.url if self._overlay else None
        return manifests(self._job, self._plan, Submission(name, argv[-1], argv, code))


class KubernetesJobs:
    """``launcher.backends.base.Jobs`` of one namespace; a submission is a RayJob of that name.

    Args:
        namespace: of the RayJobs.
        api: the cluster's.
        render: (name, argv) → what is sent for it; None where nothing is submitted.
    """

    def __init__(
        self, namespace: str, api: Api, render: Callable[[str, Sequence[str]], list[Manifest]] | None = None
    ) -> None:
        self.address = api.server
        self._namespace, self._api, self._render = namespace, api, render
        self._looked = -LOOK_SECONDS
        self._path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"

    def submit(self, submission: str, argv: Sequence[str]) -> None:
        """See ``Jobs``."""
        assert self._render is not None, "opened to look, not to submit"
        rayjob, *owned = self._render(submission, argv)
        if broken := list(broken_rules(rayjob)):
            raise ClusterError("KubeRay would refuse this RayJob:\n  " + "\n  ".join(broken), "report it")
        made = self._api.create(self._path, rayjob) or self._api.get(f"{self._path}/{submission}") or {}
        if inside(made, "metadata", "annotations", RUN) != argv[-1]:
            raise ClusterError(
                f"there is another RayJob {submission} in namespace {self._namespace}", "delete it, or wait"
            )
        owner = {
            **{name: made[name] for name in ("apiVersion", "kind")},
            **{name: made["metadata"][name] for name in ("name", "uid")},
        }
        for each in owned:
            each["metadata"]["ownerReferences"] = [owner]
            self._api.create(_COLLECTIONS[each["kind"]].format(self._namespace), each)

    def status(self, submission: str) -> JobStatus | None:
        """See ``Jobs``."""
        rayjob = self._api.get(f"{self._path}/{submission}")
        return standing(rayjob) if rayjob else None

    def statuses(self) -> dict[str, JobStatus]:
        """How every submission in the namespace stands, by name."""
        found = self._api.list(self._path, labelSelector=SUBMISSION)
        return {rayjob["metadata"]["name"]: standing(rayjob) for rayjob in found}

    def follow(self, submission: str) -> Iterator[str]:
        """See ``Jobs``: the driver's log as the run directory has it, and before there is one, what pods wait for."""
        rayjob = self._patiently(submission, 0.0)
        if rayjob is None:
            return
        lines = _Lines(rayjob)
        said: dict[str, str] = {}
        while rayjob:
            over = standing(rayjob).over
            yield from lines.new()
            if over:
                return
            yield from _changes(self._news(rayjob, begun=lines.begun), said)
            time.sleep(POLL_SECONDS)
            rayjob = self._patiently(submission, REFUSED_SECONDS)

    def stop(self, submission: str) -> None:
        """See ``Jobs``: without its RayJob nothing of it stays, and KubeRay tells the driver to end first."""
        self._api.delete(f"{self._path}/{submission}")

    def _patiently(self, submission: str, refusal_seconds: float) -> Json | None:
        """The RayJob; raises what has kept it from us for too long, a refusal only if it lasts ``refusal_seconds``."""
        lost, refused = time.monotonic(), None
        while True:
            try:
                return self._api.get(f"{self._path}/{submission}")
            except ClusterError as error:
                now = time.monotonic()
                for_good = isinstance(error, Refused) and not error.passing
                refused = (refused or now) if for_good else None
                if now - lost > LOST_SECONDS or (refused and now - refused >= refusal_seconds):
                    raise ClusterError(f"{error.problem}\n{submission} goes on unseen", error.cure) from None
                log.debug("asking again: %s", error.problem)
                time.sleep(POLL_SECONDS)

    def _news(self, rayjob: Json, *, begun: bool) -> Iterator[tuple[str, str]]:
        """What happens outside of the driver: (what it is about, news)."""
        lost, most = int(inside(rayjob, "status", "failed") or 0), int(rayjob["spec"].get("backoffLimit") or 0) + 1
        if lost and not standing(rayjob).over:
            yield "lost", f"cluster {lost} of at most {most} was lost; KubeRay makes the next one"
        if rayjob["spec"].get("suspend"):
            yield "queue", "waiting in the queue"
        if begun and not lost:
            return
        yield from self._hindrances(rayjob["metadata"]["name"])
        selector = f"{SUBMISSION}={rayjob['metadata']['name']}"
        pods: list[Json] = []
        with suppress(ClusterError):
            pods = self._api.list(f"/api/v1/namespaces/{self._namespace}/pods", labelSelector=selector)
        for pod in pods:
            kind = pod["metadata"]["labels"].get("ray.io/node-type", "submitter")
            yield pod["metadata"]["name"], f"{kind} {_how(pod)}"

    def _hindrances(self, submission: str) -> Iterator[tuple[str, str]]:
        """What keeps pods from coming up and what to do about it, as ``utaforge why`` has it."""
        from launcher.snapshot import observe  # these two know of this module
        from launcher.why import hindrances

        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with suppress(ClusterError):
            objects = observe(self._api, self._namespace, submission)
            for cause in hindrances(objects, objects.now or time.time()):
                yield cause.what, f"{cause.what} → {cause.cure}"


class _Lines:
    """Reads the lines of one attempt from the driver's log in the run directory, while it grows."""

    def __init__(self, rayjob: Json) -> None:
        metadata = rayjob["metadata"]
        self._store: Store = open_store(metadata["annotations"][RUN])
        self._first = attempt_begins(int(metadata["name"].rpartition("-")[2]))
        self._bytes, self._rest = 0, b""
        self.begun = False

    def new(self) -> Iterator[str]:
        """Whole lines that were not there before; none while the store is out of reach."""
        with suppress(StoreError):
            yield from self._read()

    def _read(self) -> Iterator[str]:
        folder, _, name = DRIVER_LOG.rpartition("/")
        size = next((entry.bytes for entry in self._store.list(folder) if entry.path.endswith(name)), 0)
        if size <= self._bytes:
            return
        told = self._rest + self._store.part(DRIVER_LOG, self._bytes, size)
        *lines, self._rest = told.split(b"\n")
        self._bytes = size
        for line in lines:
            text = line.decode("utf-8", "replace")
            if self.begun:
                yield text
            self.begun = self.begun or text == self._first


def standing(rayjob: Json) -> JobStatus:
    """From what KubeRay says: a program that ended itself as stopped has said why in the run directory."""
    status: Json = inside(rayjob, "status") or {}
    state, job = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    reason = ": ".join(str(status[name]) for name in ("reason", "message") if status.get(name))
    if state == "Complete":
        return JobStatus("succeeded" if job == "SUCCEEDED" else "failed", reason)
    if state in ("Failed", "ValidationFailed"):
        return JobStatus("failed", reason or state)
    return JobStatus("running" if state == "Running" else "pending", reason)


def _how(pod: Mapping[str, Any]) -> str:
    """How a pod stands, for people."""
    name, status = pod["metadata"]["name"], inside(pod, "status")
    for condition in inside(status, "conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"waits for a node: {condition.get('message', 'none yet')}"
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in inside(status, kind) or ():
            reason, message = (inside(container, "state", "waiting", name) for name in ("reason", "message"))
            if reason in _UNHAPPY:
                return f"cannot start: {reason}: {message or 'no message'}"
    if pod["metadata"].get("deletionTimestamp"):
        return f"{name} is ending"
    return f"{name}: {str(inside(status, 'phase') or 'Pending').lower()}"


def _changes(news: Iterator[tuple[str, str]], said: dict[str, str]) -> Iterator[str]:
    """News that were not said yet; the same words about several pods are said once."""
    for subject, text in news:
        if said.get(subject) != text and text not in said.values():
            yield text
        said[subject] = text

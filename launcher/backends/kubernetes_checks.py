"""What would keep a RayJob from running, found before it is sent: everything at once, each with its cure.

What the launcher may not look at is said and counts as right: Kubernetes has the last word.
"""

import base64
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from typing import Any

from launcher.backends import registry
from launcher.backends.kubernetes_api import Api, Json, Refused
from launcher.plan import Plan
from launcher.render import inside
from launcher.render.rayjob import Manifest, requests_of
from launcher.render.rules import broken_rules
from trainer.spec import ClusterError, DataError, Job, StoreError, UtaforgeError, dump_job
from trainer.spec.cluster import Kubernetes
from trainer.store import OUT_OF_REACH, open_store

log = logging.getLogger(__name__)
_RIGHTS = (
    ("ray.io", "rayjobs", ("create", "get", "delete")),
    ("policy", "poddisruptionbudgets", ("create",)),
    ("networking.k8s.io", "networkpolicies", ("create",)),
    ("", "pods", ("list",)),
)
"""Without these a run cannot be submitted, followed or cancelled."""
_IDENTITIES = ("eks.amazonaws.com/role-arn", "iam.gke.io/gcp-service-account")
"""Annotations of service accounts whose pods get cloud credentials without a secret."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_MAKES_NODES = ("cloud.google.com/gke-nodepool", "eks.amazonaws.com/nodegroup", "karpenter.sh/nodepool")
"""Labels of nodes that come and go as pods need them."""
_UNITS: Mapping[str, int | Decimal] = {
    **{"": 1, "m": Decimal("0.001"), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "k": 1000},
    **{letter: 1000**power for power, letter in enumerate("MGTPE", 2)},
    **{f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)},
}


def checks(api: Api, job: Job, plan: Plan, made: list[Manifest]) -> Iterator[UtaforgeError]:
    """Everything that stands in the way of ``made``, the manifests of ``job``."""
    cluster = job.cluster
    assert isinstance(cluster, Kubernetes)
    secrets = _Secrets(api, cluster)
    every: tuple[Callable[[], Iterator[UtaforgeError]], ...] = (
        lambda: _rules(made[0]),
        lambda: _rights(api, cluster.namespace),
        lambda: _accepted(api, cluster.namespace, made[0]),
        lambda: _service_account(api, cluster),
        lambda: secrets.missing(),
        lambda: secrets.lacking(job),
        lambda: _store(job, secrets),
        lambda: _image(cluster, secrets),
        lambda: _quota(api, cluster.namespace, made[0]),
        lambda: _nodes(api, plan, made[0]),
        lambda: _queue(api, cluster),
        lambda: _songs(job),
    )
    with ThreadPoolExecutor(4) as pool:
        found = [error for each in pool.map(_found, every) for error in each]
    unseen = {right for error in found if (right := isinstance(error, Refused) and error.lacks_right)}
    if unseen:
        log.warning("not checked, since you may not: %s", ", ".join(sorted(unseen)))
    told = {str(error): error for error in found if not (isinstance(error, Refused) and error.lacks_right)}
    yield from told.values()


def _found(check: Callable[[], Iterator[UtaforgeError]]) -> list[UtaforgeError]:
    try:
        return list(check())
    except UtaforgeError as error:
        return [error]


def _rules(rayjob: Manifest) -> Iterator[UtaforgeError]:
    for rule in broken_rules(rayjob):
        yield ClusterError(f"KubeRay would refuse the RayJob: {rule}", "report it")


def _rights(api: Api, namespace: str) -> Iterator[UtaforgeError]:
    lacking: list[str] = []
    for group, resource, verbs in _RIGHTS:
        for verb in verbs:
            asked = {"group": group, "resource": resource, "verb": verb, "namespace": namespace}
            body = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": asked},
            }
            told = api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body) or {}
            if not told["status"]["allowed"]:
                lacking.append(f"{verb} {resource}")
    if lacking:
        yield ClusterError(
            f"you may not, in namespace {namespace}: {', '.join(lacking)}",
            "whoever runs this cluster has to give these rights: k8s/base has the role of the launcher",
        )


def _accepted(api: Api, namespace: str, rayjob: Manifest) -> Iterator[UtaforgeError]:
    """The server itself looks at the RayJob, and forgets it again."""
    api.create(f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs", rayjob, dryRun="All")
    yield from ()


def _service_account(api: Api, cluster: Kubernetes) -> Iterator[UtaforgeError]:
    name = cluster.service_account
    if api.get(f"/api/v1/namespaces/{cluster.namespace}/serviceaccounts/{name}") is None:
        yield ClusterError(
            f"cluster.service_account: there is no {name} in namespace {cluster.namespace}",
            "make it (kubectl apply -k k8s/base does), or name another",
        )


class _Secrets:
    """The secrets that a job names, as far as they may be read."""

    def __init__(self, api: Api, cluster: Kubernetes) -> None:
        self._api, self._cluster = api, cluster
        self._known: dict[str, Json | None] = {}

    def missing(self) -> Iterator[UtaforgeError]:
        """Those that are not there."""
        for field in ("secrets", "pull_secrets"):
            for name in getattr(self._cluster, field):
                try:
                    there = self.get(name)
                except Refused as refused:
                    yield refused
                    continue
                if there is None:
                    yield ClusterError(
                        f"cluster.{field}: there is no secret {name} in namespace {self._cluster.namespace}",
                        f"make it: kubectl -n {self._cluster.namespace} create secret …; k8s/README.md shows how",
                    )

    def lacking(self, job: Job) -> Iterator[UtaforgeError]:
        """Keys that pods need and that no secret has."""
        cluster = self._cluster
        needed = set(re.findall(r'"\$\{env:(\w+)\}"', dump_job(job)))
        if job.store.startswith("s3://") and not self._identity():
            needed |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        if job.store.startswith("s3://") and any(os.environ.get(name) for name in _ENDPOINTS):
            needed.add(_ENDPOINTS[-1])
        found = [self.get(name) for name in cluster.secrets]
        if None in found:
            return
        keys = {key for secret in found for key in inside(secret, "data") or ()}
        if keys & set(_ENDPOINTS):
            needed.discard(_ENDPOINTS[-1])
        if lacking := sorted(needed - keys):
            named = f"the secrets {', '.join(cluster.secrets)} lack" if cluster.secrets else "no secret gives pods"
            yield ClusterError(
                f"cluster.secrets: {named} {', '.join(lacking)}",
                "add the keys; a store of this cluster's own needs AWS_ENDPOINT_URL as pods see it"
                if cluster.secrets
                else "make a secret with these keys and name it there; k8s/README.md shows how",
            )

    def variables(self) -> dict[str, str]:
        """What pods get from them; the last of two with one key counts, as with ``envFrom``."""
        found = [self.get(name) for name in self._cluster.secrets]
        data: dict[str, str] = {}
        for secret in found:
            data |= inside(secret, "data") or {}
        return {key: base64.b64decode(value).decode("utf-8", "replace") for key, value in data.items()}

    def logins(self) -> dict[str, str]:
        """For registries."""
        found = [self.get(name) for name in self._cluster.pull_secrets]
        return registry.logins_of(secret for secret in found if secret)

    def get(self, name: str) -> Json | None:
        """One of them; None if it is not there."""
        if name not in self._known:
            self._known[name] = self._api.get(f"/api/v1/namespaces/{self._cluster.namespace}/secrets/{name}")
        return self._known[name]

    def _identity(self) -> bool:
        account = self._api.get(
            f"/api/v1/namespaces/{self._cluster.namespace}/serviceaccounts/{self._cluster.service_account}"
        )
        return any(name in (inside(account, "metadata", "annotations") or ()) for name in _IDENTITIES)


def _store(job: Job, secrets: _Secrets) -> Iterator[UtaforgeError]:
    """Whether the store takes the keys that pods will have; ``lacking`` tells of those that are not there."""
    variables = secrets.variables()
    keys = variables.keys() >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    elsewhere = any(os.environ.get(name) for name in _ENDPOINTS) and not variables.keys() & set(_ENDPOINTS)
    if not job.store.startswith("s3://") or not keys or elsewhere:
        return
    try:
        open_store(job.store, variables).check_writable()
    except StoreError as error:
        if OUT_OF_REACH not in error.problem:
            yield ClusterError(
                f"cluster.secrets: with the keys of the pods: {error.problem}", f"for the pods: {error.cure}"
            )


def _image(cluster: Kubernetes, secrets: _Secrets) -> Iterator[UtaforgeError]:
    assert cluster.image
    answer = registry.look(cluster.image, secrets.logins())
    if answer == "missing":
        yield ClusterError(
            f"cluster.image: its registry has no {cluster.image}", "push it: make image PUSH=1; or correct its name"
        )
    if answer == "denied":
        yield ClusterError(
            f"cluster.image: its registry does not give {cluster.image} to "
            + (f"the logins in {', '.join(cluster.pull_secrets)}" if cluster.pull_secrets else "everybody"),
            "correct its name, or name a secret with a login: cluster.pull_secrets",
        )


def _quota(api: Api, namespace: str, rayjob: Manifest) -> Iterator[UtaforgeError]:
    """More than the namespace may ever have is refused; what others use at the moment is waited for."""
    wanted: dict[str, Decimal] = {"pods": Decimal(0)}
    for count, template in requests_of(rayjob):
        wanted["pods"] += count
        resources = template["spec"]["containers"][0]["resources"]
        for kind in ("requests", "limits"):
            for name, value in resources[kind].items():
                for key in (f"{kind}.{name}", *([name] if kind == "requests" else [])):
                    wanted[key] = wanted.get(key, Decimal(0)) + count * amount(value)
    for quota in api.list(f"/api/v1/namespaces/{namespace}/resourcequotas"):
        hard: Json = inside(quota, "spec", "hard") or {}
        for key, value in hard.items():
            if wanted.get(key, 0) > amount(value):
                yield ClusterError(
                    f"the ResourceQuota {quota['metadata']['name']} of namespace {namespace} allows {key} {value}, "
                    f"and this takes {_shown(wanted[key])}",
                    "ask for more, or take fewer cluster.workers or a smaller cluster.profile",
                )


def _nodes(api: Api, plan: Plan, rayjob: Manifest) -> Iterator[UtaforgeError]:
    """Whether the nodes, empty, have room for each kind of pod; where nodes are made on demand nobody can tell."""
    nodes = api.list("/api/v1/nodes")
    if not nodes or any(label in _labels(node) for node in nodes for label in _MAKES_NODES):
        return
    with suppress(ClusterError):
        if api.list("/apis/karpenter.sh/v1/nodepools"):
            return
    for kind, (count, template) in zip(("heads", "workers", "submitters"), requests_of(rayjob), strict=True):
        if lacking := _no_room(nodes, kind, count, template, plan.profile):
            yield lacking


def _no_room(nodes: list[Json], kind: str, count: int, template: Manifest, profile: str) -> ClusterError | None:
    labelled = [node for node in nodes if has_labels(node, template["spec"])]
    open_to = [node for node in labelled if lets_in(node, template["spec"])]
    room = sum(_room(node, template) for node in open_to)
    if room >= count:
        return None
    place = "cluster.profile" if kind == "workers" else f"cluster.profile: for the {kind[:-1]}, which takes no GPU"
    if not labelled:
        what = f"none of {len(nodes)} nodes has the labels that profile {profile} looks for"
        cure = (
            "kubectl get nodes --show-labels; put yours into a profile of your own beside the job (profiles/NAME.yaml)"
        )
    elif not open_to:
        what = f"all {len(labelled)} nodes with the labels of profile {profile} have taints or are cordoned"
        cure = "kubectl describe nodes; add their taints to tolerations in a profile of your own"
    else:
        wanted = ", ".join(f"{name} {value}" for name, value in _requests(template).items())
        what = f"the {len(open_to)} nodes fit for it have room for {room} of {count} {kind} with {wanted} each"
        cure = "take fewer cluster.workers, or say in a profile of your own what your nodes have"
    if kind != "workers":
        cure = "add a node without taints, not a spot one, with room for it: kubectl describe nodes shows what there is"
    return ClusterError(f"{place}: {what}", cure)


def _queue(api: Api, cluster: Kubernetes) -> Iterator[UtaforgeError]:
    queue = cluster.queue
    if queue is None:
        return
    local = f"namespaces/{cluster.namespace}/localqueues"
    paths = {
        "kueue": (f"/apis/kueue.x-k8s.io/v1beta2/{local}", f"/apis/kueue.x-k8s.io/v1beta1/{local}"),
        "volcano": ("/apis/scheduling.volcano.sh/v1beta1/queues",),
    }
    if not any(api.get(f"{path}/{queue.name}") for path in paths[queue.kind]):
        yield ClusterError(
            f"cluster.queue: this cluster has no {queue.kind} queue {queue.name}", "correct its name, or remove it"
        )


def _songs(job: Job) -> Iterator[UtaforgeError]:
    """Songs of this machine are not seen from the cluster; what was made of them is."""
    path = getattr(job.data.prepare.source, "path", None) if job.data.prepare else None
    if path is None or "://" in path:
        return
    url = job.data.train[0].dataset
    if not any(True for _ in open_store(url).list("versions")):
        yield DataError(
            f"data.prepare.source.path: {path} is on this machine, and {url} is empty",
            "run utaforge prepare with this job here, where the songs are; then submit it",
        )


def amount(quantity: str) -> Decimal:
    """A Kubernetes quantity as a number: ``500m`` is 0.5, ``1Gi`` is 1073741824."""
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([KMGTPE]i|[numkMGTPE])?", quantity)
    assert match, quantity
    return Decimal(match[1]) * _UNITS[match[2] or ""]


def _shown(value: Decimal) -> str:
    return f"{value / 1024**3:.1f}Gi" if value >= 1024**3 else f"{value.normalize():f}"


def _requests(template: Manifest) -> Mapping[str, str]:
    return template["spec"]["containers"][0]["resources"]["requests"]


def _labels(node: Json) -> Mapping[str, str]:
    return inside(node, "metadata", "labels") or {}


def has_labels(node: Json, spec: Manifest) -> bool:
    """Whether ``node`` has the labels that a pod's affinity asks for."""
    labels = _labels(node)
    required = inside(spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    terms: list[Any] = inside(required, "nodeSelectorTerms") or [{"matchExpressions": []}]
    return any(
        all(
            (labels.get(each["key"]) in each["values"]) == (each["operator"] == "In")
            for each in term["matchExpressions"]
        )
        for term in terms
    )


def lets_in(node: Json, spec: Manifest) -> bool:
    """Whether a pod tolerates the taints of ``node``."""
    taints: list[Json] = [each for each in inside(node, "spec", "taints") or () if each["effect"] != "PreferNoSchedule"]
    return all(any(_tolerates(each, taint) for each in inside(spec, "tolerations") or ()) for taint in taints)


def _tolerates(toleration: Json, taint: Json) -> bool:
    if toleration.get("effect") not in (None, taint["effect"]) or toleration.get("key", taint["key"]) != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value") == taint.get("value", "")


def _room(node: Json, template: Manifest) -> int:
    has = node["status"]["allocatable"]
    return min(int(amount(has.get(name, "0")) // amount(value)) for name, value in _requests(template).items())

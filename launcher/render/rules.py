"""What KubeRay's controller demands of a RayJob beyond its schema.

The API server accepts what breaks these rules; the controller then leaves the RayJob as ``ValidationFailed``, or does
something nobody meant. Source: ``ray-operator/controllers/ray/utils/validation.go`` and ``common/job.go`` of KubeRay
1.6.2 (https://github.com/ray-project/kuberay).
"""

import re
import shlex
from collections.abc import Iterator

from . import inside
from .rayjob import NAME_LENGTH, Manifest

_DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_START_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
_TOKEN_SINCE = (2, 52)


def broken_rules(rayjob: Manifest) -> Iterator[str]:
    """Every rule that ``rayjob`` breaks, in a sentence."""
    yield from _name(rayjob["metadata"]["name"])
    spec = rayjob["spec"]
    yield from _entrypoint(spec["entrypoint"])
    yield from _ending(spec)
    yield from _modes(spec)
    yield from _cluster(spec["rayClusterSpec"])


def _name(name: str) -> Iterator[str]:
    if len(name) > NAME_LENGTH:
        yield f"metadata.name: {name} has more than {NAME_LENGTH} characters"
    if not _DNS_1035.fullmatch(name):
        yield f"metadata.name: {name} is no DNS-1035 label"


def _entrypoint(entrypoint: str) -> Iterator[str]:
    """It is pasted, unquoted, into a shell line of the submitter: what is more than one command is run there."""
    if shlex.join(shlex.split(entrypoint)) != entrypoint:
        yield "spec.entrypoint: has to be one command without shell syntax"


def _ending(spec: Manifest) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    rules = inside(spec, "deletionStrategy", "deletionRules")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend: needs shutdownAfterJobFinishes"
    if rules and shutdown:
        yield "spec.deletionStrategy: deletionRules and shutdownAfterJobFinishes exclude each other"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"spec.{name}: has to be more than 0"
    if spec.get("backoffLimit", 0) < 0:
        yield "spec.backoffLimit: has to be 0 or more"


def _modes(spec: Manifest) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield "spec.submissionMode: SidecarMode has no submitter to configure"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "spec.submissionMode: InteractiveMode does not try again; remove backoffLimit"
    if spec.get("clusterSelector"):
        yield "spec.clusterSelector: every submission has a cluster of its own"


def _cluster(cluster: Manifest) -> Iterator[str]:
    if inside(cluster, "authOptions", "mode") == "token":
        version = cluster.get("rayVersion") or "0"
        if tuple(map(int, version.split(".")[:2])) < _TOKEN_SINCE:
            yield f"spec.rayClusterSpec.authOptions: mode token needs rayVersion 2.52 or newer, not {version}"
    yield from _group("headGroupSpec", cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        where = f"workerGroupSpecs.{group['groupName']}"
        yield from _group(where, group)
        if not cluster.get("enableInTreeAutoscaling"):
            yield from _replicas(where, group)


def _group(where: str, group: Manifest) -> Iterator[str]:
    parameters: Manifest = inside(group, "rayStartParams") or {}
    labels: Manifest = inside(group, "labels") or {}
    yield from (
        f"{where}.rayStartParams.{name}: has to be text, not {value!r}"
        for name, value in parameters.items()
        if not isinstance(value, str)
    )
    if "labels" in parameters:
        yield f"{where}.rayStartParams.labels: belongs into the group's labels"
    if group.get("resources") and _START_RESOURCES & parameters.keys():
        yield f"{where}.resources: exclude {', '.join(sorted(_START_RESOURCES & parameters.keys()))} in rayStartParams"
    for name, value in labels.items():
        if not _LABEL_VALUE.fullmatch(value):
            yield f"{where}.labels.{name}: {value!r} cannot be the value of a label"
    if not group["template"]["spec"]["containers"]:
        yield f"{where}.template: has no container"


def _replicas(where: str, group: Manifest) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if least is None or most is None:
        yield f"{where}: needs minReplicas and maxReplicas"
    elif not 0 <= least <= most:
        yield f"{where}: minReplicas {least} to maxReplicas {most} is no range"

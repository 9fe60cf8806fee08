"""Plan → a RayJob for KubeRay, with a disruption budget and a network policy of its own.

Fields: https://github.com/ray-project/kuberay/blob/v1.6.2/docs/reference/api.md. KubeRay starts the program again on a
new cluster whenever one has failed (``backoffLimit``); ``trainer.driver`` sees to it that only a lost cluster counts.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.plan import Plan
from launcher.profiles import Nodes, Profile
from trainer.spec import Job, JobError
from trainer.spec.cluster import Kubernetes

RAY_VERSION = "2.60.0"
GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
JOB, RUN, SUBMISSION = "utaforge/job", "utaforge/run", "utaforge/submission"
"""Labels of what belongs to a job, to a run, and to one submission of it; as annotation, ``RUN`` is the run's URL."""
NAME_LENGTH = 47
USER = 1000
DRAIN_SECONDS, GRACE_SECONDS = 100, 120
"""A node that is taken away gives its ranks this long; Kubernetes kills only after that."""
START_SECONDS = 1200
"""How long the pods of one cluster are waited for: GPU nodes come up and images of some gigabytes are pulled. KubeRay
tries the next cluster after that, as after any loss: what never comes up holds nodes ``attempts`` times as long."""
OBJECT_STORE_BYTES = 256 << 20
"""Ray Train sends little through it; songs and weights never."""
SCRATCH = "/tmp"  # noqa: S108
QUEUE_LABELS = {"kueue": "kueue.x-k8s.io/queue-name", "volcano": "volcano.sh/queue-name"}
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Attributes:
        name: of the RayJob, from ``object_name``.
        run_url: the run directory.
        argv: the program.
        code_url: archive whose packages come before the image's; None: the image's own.
    """

    name: str
    run_url: str
    argv: Sequence[str]
    code_url: str | None = None


def object_name(run_url: str, attempt: int) -> str:
    """A name that KubeRay takes (a DNS-1035 label of at most 47 characters), different for runs of different stores."""
    run = run_url.rsplit("/", 1)[-1]
    end = f"-{hashlib.sha256(run_url.encode()).hexdigest()[:6]}-{attempt}"
    start = run if run[0].isalpha() else f"r{run}"
    return start[: NAME_LENGTH - len(end)].rstrip("-") + end


def manifests(job: Job, plan: Plan, submission: Submission) -> list[Manifest]:
    """Everything that is sent for one submission: the RayJob, then what it will own.

    Raises:
        JobError: the job names no image, or asks for spot nodes where its profile knows none.
    """
    cluster = job.cluster
    assert isinstance(cluster, Kubernetes)
    pods = _Pods(cluster, plan, submission)
    return [
        _rayjob(job, cluster, plan, submission, pods),
        _disruption_budget(cluster, submission),
        _network_policy(cluster, submission),
    ]


def requests_of(rayjob: Manifest) -> list[tuple[int, Manifest]]:
    """How often each kind of pod is made, and its template: the head, the workers, the submitter."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    workers = [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    return [(1, cluster["headGroupSpec"]["template"]), *workers, (1, rayjob["spec"]["submitterPodTemplate"])]


def _rayjob(job: Job, cluster: Kubernetes, plan: Plan, submission: Submission, pods: "_Pods") -> Manifest:
    queue = {QUEUE_LABELS[cluster.queue.kind]: cluster.queue.name} if cluster.queue else {}
    spec: Manifest = {
        "submissionMode": "K8sJobMode",
        "entrypoint": shlex.join(submission.argv),
        "backoffLimit": cluster.attempts - 1,
        "submitterConfig": {"backoffLimit": 2},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "preRunningDeadlineSeconds": START_SECONDS,
        "submitterPodTemplate": pods.submitter(),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "enableInTreeAutoscaling": False,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {
                    **_START,
                    "num-cpus": "0",
                    "dashboard-host": "0.0.0.0",  # noqa: S104
                    "no-monitor": "true",  # the autoscaler, which has nothing to scale here
                },
                "template": pods.head(),
            },
            "workerGroupSpecs": [_workers(cluster, plan, pods)],
        },
    }
    if job.budget.hours:
        spec["activeDeadlineSeconds"] = round(job.budget.hours * 3600) + START_SECONDS  # if the driver does not end it
    if submission.code_url:
        spec["runtimeEnvYAML"] = f"py_modules: [{submission.code_url}]\n"
    if cluster.queue and cluster.queue.kind == "kueue":
        spec["suspend"] = True
    metadata = _metadata(cluster, submission)
    metadata["labels"] |= {JOB: job.name, **queue}
    metadata["annotations"] = {
        RUN: submission.run_url,
        "ray.io/disable-provisioned-head-restart": "true",  # a new head knows nothing of the job and waits for ever
    }
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _workers(cluster: Kubernetes, plan: Plan, pods: "_Pods") -> Manifest:
    labels = {"ray.io/market-type": "spot" if cluster.spot else "on-demand"}
    if plan.machine.gpu:
        labels["ray.io/accelerator-type"] = plan.machine.gpu
    count = {"replicas": plan.machines, "minReplicas": plan.machines, "maxReplicas": plan.machines, "numOfHosts": 1}
    cores = "1" if plan.machine.gpu is None else str(max(1, int(pods.cores)))  # one rank each without GPUs
    return {
        "groupName": re.sub(r"[^a-z0-9-]", "-", plan.profile),
        **count,
        "labels": labels,
        "rayStartParams": {**_START, "num-cpus": cores},
        "template": pods.worker(),
    }


_START = {
    "object-store-memory": str(OBJECT_STORE_BYTES),
    "disable-usage-stats": "true",
    "dashboard-agent-grpc-port": "52366",  # what Ray's agents choose themselves Ray waits for, 15 s, and then it ends
    "runtime-env-agent-port": "52367",
}


class _Pods:
    """Pod templates of one submission."""

    def __init__(self, cluster: Kubernetes, plan: Plan, submission: Submission) -> None:
        if cluster.image is None:
            raise JobError(
                "cluster.image: pods need an image", "build it with make image, push it, and write its name there"
            )
        self._cluster, self._plan, self._submission = cluster, plan, submission
        self._ranks = plan.ranks // plan.machines
        machine = plan.machine
        self._share = self._ranks / machine.gpus if machine.gpus else 1.0
        self.cores = machine.cores * self._share

    def head(self) -> Manifest:
        """Ray's head, where the driver runs: it prepares songs, and never trains."""
        machine = self._plan.machine
        small = {"cores": 2.0, "ram_gib": 8.0, "disk_gib": 20}
        size = small if machine.gpu else {name: getattr(machine, name) for name in small}
        container = self._container("ray-head", size["cores"], size["ram_gib"], {})
        container |= {"env": _env(self._environment()), "readinessProbe": _READY}
        return self._template(container, size["disk_gib"], size["ram_gib"], _off_spot(machine), annotations=_KEEP)

    def worker(self) -> Manifest:
        """As many ranks as fit on one machine."""
        machine = self._plan.machine
        ram, disk = machine.ram_gib * self._share, max(1, int(machine.disk_gib * self._share))
        devices = {"nvidia.com/gpu": str(self._ranks)} if machine.gpu else {}
        container = self._container("ray-worker", self.cores, ram, devices)
        threads = {"OMP_NUM_THREADS": str(max(1, int(self.cores / self._ranks)))}
        drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS)}
        container |= {"env": _env(self._environment() | threads | drain), "readinessProbe": _READY}
        template = self._template(container, disk, ram, _nodes(machine, self._cluster.spot))
        template["spec"] |= {
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "tolerations": _tolerations(machine, self._cluster.spot),
        }
        return template

    def submitter(self) -> Manifest:
        """What hands the program to Ray and waits."""
        container = self._container("ray-job-submitter", 0.1, 0.5, {})
        container["env"] = _env({"RAY_AUTH_MODE": "token", "HOME": SCRATCH, "RAY_USAGE_STATS_ENABLED": "0"})
        template = self._template(container, 1, 1, _off_spot(self._plan.machine))
        template["spec"]["restartPolicy"] = "Never"
        return template

    def _template(
        self, container: Manifest, disk_gib: float, ram_gib: float, terms: list[Manifest], annotations: Any = None
    ) -> Manifest:
        cluster = self._cluster
        shared = max(256, min(16 << 10, int(ram_gib * 1024 / 4)))
        spec: Manifest = {
            "serviceAccountName": cluster.service_account,
            "automountServiceAccountToken": False,
            "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "scratch", "emptyDir": {"sizeLimit": f"{disk_gib:g}Gi"}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared}Mi"}},
            ],
        }
        if terms:
            required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
            spec["affinity"] = {"nodeAffinity": required}
        metadata: Manifest = {"labels": _labels(self._submission)}
        if annotations:
            metadata["annotations"] = annotations
        return {"metadata": metadata, "spec": spec}

    def _container(self, name: str, cores: float, ram_gib: float, devices: Mapping[str, str]) -> Manifest:
        memory = f"{round(ram_gib * 1024)}Mi"
        return {
            "name": name,
            "image": self._cluster.image,
            "resources": {  # no limit of cores: it would only slow down what could use idle ones
                "requests": {"cpu": f"{round(cores * 1000)}m", "memory": memory, **devices},
                "limits": {"memory": memory, **devices},
            },
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "envFrom": [{"secretRef": {"name": secret}} for secret in self._cluster.secrets],
            "volumeMounts": [
                {"name": "scratch", "mountPath": SCRATCH},
                {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
            ],
        }

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": SCRATCH,
            "UTAFORGE_HOME": f"{SCRATCH}/utaforge",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_agent_register_timeout_ms": "180000",  # Ray's own 30 s end the head on a busy node
            "RAY_SCHEDULER_EVENTS": "0",  # advice for those who run Ray's autoscaler; utaforge tells what pods wait for
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line printed by a rank arrives twice
            "HF_HUB_OFFLINE": "1",  # what is trained comes from the store; nothing is fetched behind its back
            "TRANSFORMERS_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
        }


_READY = {
    "httpGet": {"path": "/api/healthz", "port": 52365},
    "periodSeconds": 1,
    "timeoutSeconds": 5,
    "failureThreshold": 30,
}
"""What KubeRay asks of Ray's agent too (``initLivenessAndReadinessProbe`` in its ``common/pod.go``, v1.6.2), but only
10 s after the start and then every 5 s; it hands the program over once all pods are ready."""
_KEEP = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Autoscalers may not tidy the head away; the whole cluster would go with it."""


def _env(variables: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _nodes(machine: Profile, spot: bool) -> list[Manifest]:
    """One term for each kind of Kubernetes that the profile knows; a node has to match one of them."""
    kinds = [nodes for nodes in machine.nodes if nodes.spot or not spot]
    if spot and not kinds:
        raise JobError(f"cluster.spot: profile {machine.name} names no spot nodes", "remove it, or add their labels")
    return [{"matchExpressions": _expressions(nodes, spot)} for nodes in kinds]


def _expressions(nodes: Nodes, spot: bool) -> list[Manifest]:
    has = [{"key": key, "operator": "In", "values": [value]} for key, value in nodes.labels.items()]
    taken = "In" if spot else "NotIn"
    return [*has, *({"key": key, "operator": taken, "values": [value]} for key, value in nodes.spot.items())]


def _off_spot(machine: Profile) -> list[Manifest]:
    """Keeps away from spot nodes, of whatever kind."""
    labels = {key: value for nodes in machine.nodes for key, value in nodes.spot.items()}
    terms = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in labels.items()]
    return [{"matchExpressions": terms}] if terms else []


def _tolerations(machine: Profile, spot: bool) -> list[Manifest]:
    own = [toleration.model_dump(exclude_none=True) for toleration in machine.tolerations]
    labels = {key: value for nodes in machine.nodes for key, value in nodes.spot.items() if spot}
    taints = [
        {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in labels.items()
    ]
    return [*own, *taints]


def _labels(submission: Submission) -> dict[str, str]:
    run = submission.run_url.rsplit("/", 1)[-1]
    return {"app.kubernetes.io/name": "utaforge", RUN: run, SUBMISSION: submission.name}


def _metadata(cluster: Kubernetes, submission: Submission) -> Manifest:
    return {"name": submission.name, "namespace": cluster.namespace, "labels": _labels(submission)}


def _disruption_budget(cluster: Kubernetes, submission: Submission) -> Manifest:
    """Nobody drains the head away politely; workers may go, their ranks come back."""
    head = {SUBMISSION: submission.name, "ray.io/node-type": "head"}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(cluster, submission),
        "spec": {"minAvailable": 1, "selector": {"matchLabels": head}},
    }


def _network_policy(cluster: Kubernetes, submission: Submission) -> Manifest:
    """Only pods of the same submission reach each other; KubeRay may ask the head how the job stands."""
    own = {"matchLabels": {SUBMISSION: submission.name}}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, submission),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": own}]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]},
            ],
        },
    }

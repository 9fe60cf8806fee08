"""A job with a ``retrain`` section → the Kubernetes objects that retrain it on its schedule.

Fields: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/cron-job-v1/.
"""

import shlex
from collections.abc import Sequence
from typing import Any

from launcher.render.rayjob import JOB
from launcher.retrain import NOTHING_TO_DO, REJECTED
from launcher.runs import Busy
from trainer.spec import Job, JobError
from trainer.spec.cluster import Kubernetes

IMAGE = "utaforge-launcher"
"""A name for kustomize's ``images:`` to replace."""
SERVICE_ACCOUNT = "utaforge-launcher"
START_SECONDS = 3600
"""A start that is missed by more than this waits for the next one."""
LONGEST_SECONDS = 7 * 24 * 3600
"""The launcher only follows the run; one that hangs must not keep all later retrainings away."""
UID = 1000
_FOLDER, _JOB = "/etc/utaforge", "job.yaml"
Manifest = dict[str, Any]


def cronjob(
    job: Job, text: str, *, profile: str | None = None, image: str = IMAGE, overrides: Sequence[str] = ()
) -> list[Manifest]:
    """A ConfigMap with the job file and the CronJob that runs ``utaforge retrain`` on it.

    The launcher gets the secrets that the job's pods get (``cluster.secrets``, ``cluster.pull_secrets``): it reads and
    writes the same store, and its image comes from the same registry. ``cluster.context`` and ``cluster.code`` are of
    the machine that the job was written on: in the cluster there is no kubeconfig, and what is trained is the image's.

    Both are called like the job with ``-retrain``, which is short enough: a job's name has 36 characters at most, a
    CronJob's 52. Nothing to do, a rejected candidate, and another retraining at work are no failures of the Kubernetes
    Job; everything else but a promotion is.

    Args:
        job: the job.
        text: of its file.
        profile: text of the job's profile, if it is one of the user's own.
        image: the launcher's.
        overrides: as for ``--set``.

    Raises:
        JobError: the job has no ``retrain`` section or does not run on Kubernetes.
    """
    if job.retrain is None:
        raise JobError(f"{job.name} has no retrain section", 'write retrain: {cron: "0 3 * * 0"} into the job file')
    if not isinstance(job.cluster, Kubernetes):
        raise JobError(
            f"{job.name} runs on backend {job.cluster.backend}, which a CronJob cannot reach",
            "write cluster: {backend: kubernetes, …}",
        )
    name, labels = f"{job.name}-retrain", {"app.kubernetes.io/name": "utaforge-launcher", JOB: job.name}
    files = {_JOB: text} | ({f"profiles/{job.cluster.profile}.yaml": profile} if profile else {})
    metadata = {"name": name, "namespace": job.cluster.namespace, "labels": labels}
    mounted = {"name": name, "items": [{"key": _key(path), "path": path} for path in files]}
    template = {"metadata": {"labels": labels}, "spec": _pod(mounted, image, overrides, job.cluster)}
    schedule: Manifest = {
        "schedule": job.retrain.cron,
        "timeZone": job.retrain.timezone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": START_SECONDS,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "metadata": {"labels": labels},
            "spec": {"backoffLimit": 0, "activeDeadlineSeconds": LONGEST_SECONDS, "template": template},
        },
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {_key(path): told for path, told in files.items()},
        },
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": schedule},
    ]


def as_yaml(manifests: Sequence[Manifest]) -> str:
    """For ``kubectl apply -f -``; texts of several lines stay readable."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(_: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return yaml.ScalarNode("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(manifests, Dumper=Dumper, allow_unicode=True, sort_keys=False, width=120)


def _key(path: str) -> str:
    return path.replace("/", ".")  # a ConfigMap's keys have no slashes


def _pod(config: Manifest, image: str, overrides: Sequence[str], cluster: Kubernetes) -> Manifest:
    """A pod that Pod Security ``restricted`` admits, with nothing to write to but an empty folder."""
    environment = {"HOME": "/tmp", "UTAFORGE_HOME": "/tmp/utaforge", "PYTHONUNBUFFERED": "1"}  # noqa: S108
    container: Manifest = {
        "name": "launcher",
        "image": image,
        "command": ["/bin/sh", "-c", _script([*overrides, *_of_a_machine(cluster)])],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in cluster.secrets],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "job", "mountPath": _FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }
    return {
        "serviceAccountName": SERVICE_ACCOUNT,
        "restartPolicy": "Never",
        **({"imagePullSecrets": [{"name": name} for name in cluster.pull_secrets]} if cluster.pull_secrets else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "job", "configMap": config},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
    }


def _of_a_machine(cluster: Kubernetes) -> list[str]:
    """Overrides that take back what means nothing in a pod."""
    return [f"cluster.{field}=null" for field in ("context", "code") if getattr(cluster, field) is not None]


def _script(overrides: Sequence[str]) -> str:
    command = [
        "utaforge",
        "retrain",
        f"{_FOLDER}/{_JOB}",
        *(part for override in overrides for part in ("--set", override)),
    ]
    harmless = "|".join(str(code) for code in (NOTHING_TO_DO, REJECTED, Busy.exit_code))
    return f"{shlex.join(command)}\ncode=$?\ncase $code in {harmless}) exit 0 ;; esac\nexit $code\n"

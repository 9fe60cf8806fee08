"""From ``utaforge submit`` to the first step that the workers train ÷ the same from ``kubectl apply`` of a RayJob that
somebody wrote by hand for the same trainer, with the same pods and nothing else.

Needs a cluster as ``tests/kubernetes`` brings it up (``python -m tests.kubernetes.cluster env``), and the trainer's
image in its registry, as those tests push it.
"""

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import boto3

from launcher.plan import plan
from launcher.runs import Run, create_or_resume, runs_of
from tests.kubernetes.images import TAG
from tests.kubernetes.place import SMALL
from tests.kubernetes.situations import JOB
from trainer.spec import load_job

from .figure import Figure, middle

log = logging.getLogger(__name__)
WORKERS, CORES, MEMORY = 2, "50m", "2304Mi"
UTAFORGE = Path(sys.executable).with_name("utaforge")
WAIT_SECONDS = 900.0
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")


def measure(repeats: int = 3) -> Figure:
    """Both ways in turn; the figure is the median of the ratios of neighbours."""
    os.environ |= {"AWS_ENDPOINT_URL": os.environ["UTAFORGE_TEST_S3"], "AWS_REGION": "us-east-1"}
    name = f"utaforge-bench-{secrets.token_hex(4)}"
    client: Any = boto3.client("s3")
    client.create_bucket(Bucket=name)
    _kubectl("create", "namespace", name)
    ours: list[float] = []
    bare: list[float] = []
    try:
        _kubectl("-n", name, "create", "serviceaccount", "utaforge-trainer")
        literals = [f"--from-literal={key}={os.environ[key]}" for key in KEYS]
        _kubectl("-n", name, "create", "secret", "generic", "utaforge-store", *literals)
        with tempfile.TemporaryDirectory(prefix="utaforge-bench-", dir="/tmp") as folder:
            bench = _Bench(Path(folder), name)
            bench.ours("warm")
            for turn in range(repeats):
                ours.append(bench.ours(f"ours-{turn}"))
                bare.append(bench.bare(f"bare-{turn}"))
                log.info("turn %d/%d: submit %.1f s, by hand %.1f s", turn + 1, repeats, ours[-1], bare[-1])
    finally:
        _kubectl("delete", "namespace", name, "--wait=false")
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    return Figure(
        name="submit to Kubernetes",
        ours=f"{middle(ours)} s to the first optimizer step",
        rival=f"{middle(bare)} s with a RayJob written by hand",
        value=median(ratios),
        most=1.15,
        details={"ours_seconds": ours, "bare_seconds": bare, "ratios": ratios},
    )


class _Bench:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._namespace, self._store = folder, name, f"s3://{name}/store"
        self._image = f"{os.environ['UTAFORGE_TEST_REGISTRY']}/utaforge-trainer:{TAG}"
        fields = {"name": "bench", "store": self._store, "namespace": name, "image": self._image}
        self._job = folder / "job.yaml"
        text = JOB.format(**fields).replace("workers: 1", f"workers: {WORKERS}").replace("steps: 40", "steps: 1")
        self._job.write_text(text.replace("validation: {every: 40", "validation: {every: 1"), encoding="utf-8")
        (folder / "profiles").mkdir()
        (folder / "profiles" / "tiny.yaml").write_text(SMALL)

    def ours(self, name: str) -> float:
        """Seconds with ``utaforge submit``."""
        begin = time.time()
        command = [str(UTAFORGE), "submit", str(self._job), "--yes", "--run", name]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return self._stepped(name) - begin

    def bare(self, name: str) -> float:
        """Seconds with ``kubectl apply``; the run directory is made before, and not counted."""
        job = load_job(self._job)
        run = create_or_resume(job, plan(job, self._folder).as_json(), name).run
        begin = time.time()
        _kubectl("apply", "-f", "-", stdin=json.dumps(self._rayjob(name, run)))
        while not run.finished:
            assert time.time() - begin < WAIT_SECONDS, "the hand-written RayJob trained nothing"
            time.sleep(1)
        _kubectl("-n", self._namespace, "delete", "rayjob", name, "--wait=true")
        return self._stepped(name) - begin

    def _stepped(self, name: str) -> float:
        """When the first optimizer step was recorded."""
        journal = runs_of(self._store).at(name).get("metrics.jsonl").decode().splitlines()
        return min(entry["time"] for entry in map(json.loads, journal) if "train/loss" in entry.get("metrics", {}))

    def _rayjob(self, name: str, run: Run) -> dict[str, Any]:
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": name, "namespace": self._namespace},
            "spec": {
                "entrypoint": f"python -m trainer.driver {run.url}",
                "shutdownAfterJobFinishes": True,
                "submitterPodTemplate": {"spec": {**self._pod("submitter"), "restartPolicy": "Never"}},
                "rayClusterSpec": {
                    "rayVersion": "2.60.0",
                    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": self._pod("head")}},
                    "workerGroupSpecs": [
                        {
                            "groupName": "workers",
                            **{key: WORKERS for key in ("replicas", "minReplicas", "maxReplicas")},
                            "rayStartParams": {"num-cpus": "1"},
                            "template": {"spec": self._pod("worker")},
                        }
                    ],
                },
            },
        }

    def _pod(self, name: str) -> dict[str, Any]:
        resources = {"requests": {"cpu": CORES, "memory": MEMORY}, "limits": {"memory": MEMORY}}
        container = {"name": name, "image": self._image, "resources": resources}
        return {"containers": [{**container, "envFrom": [{"secretRef": {"name": "utaforge-store"}}]}]}


def _kubectl(*arguments: str, stdin: str | None = None) -> None:
    subprocess.run(["kubectl", *arguments], input=stdin, text=True, check=True, stdout=subprocess.DEVNULL)

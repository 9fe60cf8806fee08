"""Where runs are submitted to: a team's namespace, and the command ``utaforge`` with the launcher's rights alone.

Pods run the image of the last commit, with this checkout's trainer laid over it (``cluster.code``).
"""

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Run, find_run
from tests.cluster.conftest import Started, Utaforge
from tests.kubernetes.images import ROOT
from tests.kubernetes.proxy import Proxy, through_a_proxy
from tests.kubernetes.team import Team
from trainer.spec import StoreError

STEPS, COMMIT_EVERY = 30, 3
JOB = """\
name: {name}
store: {store}
model: {{family: musicgen, pretrained: "builtin:pocket", segment_seconds: 10}}
method: {{type: lora, rank: 8, targets: [q_proj, v_proj]}}
data:
  train: [{{dataset: {store}/datasets/demo}}]
  validation: {{fraction: 0.25, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 8}}}}
train: {{steps: {steps}, batch: {{seconds: 40}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: {every}}}
validation:
  every: {steps}
  prompts: [{{tags: "元気な 祭り, 都節音階", seconds: 2, seed: 1}}]
tracking: {{mlflow: "http://mlflow:5000", experiment: 祭り}}
cluster:
  backend: kubernetes
  profile: small
  workers: 2
  namespace: {namespace}
  image: {image}
  code: {root}
  secrets: [utaforge-store, utaforge-mlflow]
"""
MOST_SECONDS = 1500
"""Of one run: images are pulled, and a cluster may be lost."""
LAUNCHER = "utaforge-launcher"
"""The service account that submits."""
SMALL = "cores: 0.05\nram_gib: 2.25\ndisk_gib: 4\n"


class Place:
    """A team's namespace and store, seen from a laptop.

    Args:
        team: whose.
        image: of the trainer.
        folder: an empty one, for job files.
        kubeconfig: of the account that submits.
        proxy: before the API server that ``kubeconfig`` leads to.

    Attributes:
        canary: a value in the secret that pods get, which is to be found nowhere else.
    """

    def __init__(self, team: Team, image: str, folder: Path, kubeconfig: Path, proxy: Proxy) -> None:
        self.team, self.cluster, self.namespace = team, team.namespace.cluster, team.namespace.name
        self.image, self.store, self.proxy = image, f"s3://{team.bucket.name}/uta", proxy
        self.canary = secrets.token_hex(16)
        (folder / "profiles").mkdir()
        (folder / "profiles" / "small.yaml").write_text(SMALL)
        variables = {**team.store_keys, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": str(ROOT)}
        self.utaforge = Utaforge(folder, variables)
        (folder / "here").mkdir()
        self.local = Utaforge(folder / "here", {**team.store_keys, "OMP_NUM_THREADS": "1"})

    def job(self, name: str) -> str:
        """A job file of that name."""
        text = JOB.format(
            name=name,
            store=self.store,
            steps=STEPS,
            every=COMMIT_EVERY,
            namespace=self.namespace,
            image=self.image,
            root=ROOT,
        )
        path = self.utaforge.folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def submit(self, name: str, *overrides: str) -> Started:
        """Submit it; returns at once."""
        return self.utaforge.start("submit", self.job(name), "--yes", *as_options(overrides))

    def follow(self, name: str) -> Started:
        """Its log, as it grows."""
        return self.utaforge.start("logs", "-f", name, "--store", self.store)

    def here(self, name: str) -> Run:
        """The same job on this machine, seen through to its end: on the same songs, with as many threads as a pod."""
        store = f"file://{self.utaforge.folder}/here"
        changes = (f"store={store}", "cluster={backend: local, workers: 2}", "tracking.mlflow=null")
        said = self.local("submit", self.job(name), "--yes", *as_options(changes))
        assert said.code == 0, said.text
        return find_run(store, name)

    def cancel(self, name: str) -> None:
        """Cancel its newest run; it has to succeed."""
        said = self.utaforge("cancel", name, "--job", self.job(name))
        assert said.code == 0, said.text

    def run(self, name: str) -> Run:
        """The run, which there has to be."""
        return find_run(self.store, name)

    def committed(self, name: str) -> int:
        """Step of the newest checkpoint; 0 where there is none yet."""
        with suppress(StoreError):
            return self.run(name).newest_commit()
        return 0

    def objects(self, kind: str, run: str | None = None) -> list[dict[str, Any]]:
        """What the API server has of a run, or of all."""
        return self.team.namespace.get(kind, "-l", f"utaforge/run={run}" if run else "utaforge/run")["items"]

    def pods(self, run: str, node_type: str) -> list[str]:
        """Names of its pods of a type that nobody has deleted."""
        found = self.team.namespace.get("pods", "-l", f"utaforge/run={run},ray.io/node-type={node_type}")["items"]
        return [pod["metadata"]["name"] for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def give_notice(self, pod: str) -> None:
        """As a node does that is taken back: whoever is on it has as long as the pod says."""
        self.team.namespace.kubectl("delete", "pod", pod, "--wait=false")

    def take_away(self, pod: str) -> None:
        """As a node does that goes without notice."""
        self.team.namespace.kubectl("delete", "pod", pod, "--grace-period=1", "--wait=false")

    def elsewhere(self, kubeconfig: Path | str, folder: Path) -> Utaforge:
        """The command on another laptop; ``folder`` is an empty one."""
        return Utaforge(folder, {**self.utaforge.environment, "KUBECONFIG": str(kubeconfig)})


@contextmanager
def a_place(team: Team, image: str, folder: Path) -> Iterator[Place]:
    """Where ``team``'s runs are submitted to; ``folder`` is an empty one."""
    own = kubeconfig_of(team, LAUNCHER, folder)
    with through_a_proxy(own, folder) as (proxy, kubeconfig), pytest.MonkeyPatch.context() as patch:
        place = Place(team, image, folder, kubeconfig, proxy)
        canary = json.dumps({"stringData": {"UTAFORGE_CANARY": place.canary}})
        team.namespace.kubectl("patch", "secret", "utaforge-store", "-p", canary)
        for name, value in {**team.store_keys, "KUBECONFIG": place.utaforge.environment["KUBECONFIG"]}.items():
            patch.setenv(name, value)  # for this process's own look into store and cluster
        try:
            yield place
        finally:
            team.namespace.kubectl("delete", "rayjobs", "--all", "--wait=false")
            for command in (place.utaforge, place.local):
                command.end_everything()


def as_options(overrides: Iterable[str]) -> list[str]:
    """``--set`` before each."""
    return [part for override in overrides for part in ("--set", override)]


def slow_steps(seconds: float, until: int) -> dict[str, tuple[str, str]]:
    """A change of a checkout: each step before ``until`` takes so much longer, and no cores."""
    step = "        result = engine.step("
    return {"loop.py": (step, f"        time.sleep({seconds} if engine.steps < {until} else 0)\n{step}")}


def changed_checkout(folder: Path, changes: Mapping[str, tuple[str, str]]) -> Path:
    """A checkout in ``folder`` whose trainer differs: module → a text that it has, and what it has there instead."""
    shutil.copytree(ROOT / "trainer", folder / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    for module, (old, new) in changes.items():
        path = folder / "trainer" / module
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def kubeconfig_of(team: Team, account: str, folder: Path) -> Path:
    """A kubeconfig with the rights of a service account, written into ``folder``."""
    config = json.loads(team.namespace.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    token = team.namespace.kubectl("create", "token", account, "--duration=6h").strip()
    config["users"][0]["user"] = {"token": token}
    path = folder / f"{account}.kubeconfig"
    path.write_text(json.dumps(config))
    return path

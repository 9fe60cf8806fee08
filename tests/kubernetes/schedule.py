"""A CronJob that retrains, and what comes of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.runs import Run
from tests.cluster.conftest import Utaforge
from tests.kubernetes.images import Images
from tests.kubernetes.overlay import Namespace
from tests.kubernetes.place import SMALL, Place
from tests.waiting import eventually
from trainer.data.prepare import prepare
from trainer.spec import load_job
from trainer.store import Store, open_store

SECONDS = 900.0
"""Of one retraining, from the minute before it starts."""
JOB = """\
name: weekly
store: {store}
model: {{family: musicgen, pretrained: "builtin:pocket", segment_seconds: 10}}
method: {{type: lora, rank: 8, targets: [q_proj, v_proj]}}
data:
  train: [{{dataset: {store}/datasets/new}}]
  validation: {{dataset: {store}/datasets/held-out}}
  prepare: {{source: {{type: demo, style: b, songs: 4}}}}
train: {{steps: 10, batch: {{seconds: 40}}, optimizer: {{lr: {lr}}}}}
checkpoint: {{every: 5}}
validation:
  every: 10
  prompts: [{{tags: "元気な 祭り, 都節音階", seconds: 1, seed: 1}}]
tracking: {{mlflow: "http://mlflow:5000", experiment: 毎週}}
cluster:
  backend: kubernetes
  profile: small
  workers: 1
  namespace: {namespace}
  image: {image}
  secrets: [utaforge-store, utaforge-mlflow]
retrain: {{cron: "* * * * *", timezone: Asia/Tokyo}}
"""
HELD_OUT = (
    "data.train=[{dataset: STORE/datasets/held-out}]",
    "data.validation={fraction: 0.5, by: song}",
    "data.prepare.source.songs=3",
    "retrain=null",
)
"""What makes the validation songs of it, with the same job."""


@dataclass
class Schedule:
    """The CronJob, seen from outside.

    Args:
        place: where it is.
        utaforge: the command, in a folder of its own.
        images: what its pods run.

    Attributes:
        champions: the run that was the champion at the end of each chapter.
        verdicts: what was said of the newest run then, if anything.
    """

    place: Place
    utaforge: Utaforge
    images: Images
    champions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Any] = field(default_factory=dict)

    @property
    def namespace(self) -> Namespace:
        return self.place.team.namespace

    def tell(self) -> "Schedule":
        """All chapters: a better run, a worse one, and one in vain."""
        job = self.write("1.0e-2")
        self.publish(job, *(override.replace("STORE", self.place.store) for override in HELD_OUT))
        self.chapter("better", "1.0e-2", 4, "weekly", lambda: self.read("weekly", "verdict.json") is not None)
        self.chapter("worse", "30", 5, "weekly-2", lambda: self.read("weekly-2", "verdict.json") is not None)
        self.chapter("in vain", "1.0e+30", 6, "weekly-3", lambda: self.read("weekly-3", "failure.json") is not None)
        self.namespace.kubectl("delete", "cronjob", "weekly-retrain")
        return self

    def write(self, lr: str) -> str:
        """The job file."""
        place = self.place
        text = JOB.format(store=place.store, lr=lr, namespace=place.namespace, image=place.image)
        path = self.utaforge.folder / "weekly.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def publish(self, job: str, *overrides: str) -> None:
        """Publish songs from this machine."""
        prepare(load_job(job, overrides))

    def chapter(self, name: str, lr: str, songs: int, run: str, ended: Callable[[], bool]) -> None:
        """With new songs and this learning rate, let the clock start ``run``; returns once that has ended."""
        job = self.write(lr)
        self.publish(job, f"data.prepare.source.songs={songs}")
        manifests = self.utaforge.output("render", "cronjob", job, "--image", self.images.name("launcher"))
        self.namespace.kubectl("apply", "-f", "-", stdin=manifests)
        self.suspend(False)
        eventually(ended, SECONDS)
        self.suspend(True)
        eventually(lambda: not self.active(), SECONDS)
        self.champions[name] = self.champion()
        self.verdicts[name] = self.read(run, "verdict.json")

    def suspend(self, whether: bool) -> None:
        """Stop the clock, or let it go on."""
        patch = json.dumps({"spec": {"suspend": whether}})
        self.namespace.kubectl("patch", "cronjob", "weekly-retrain", "-p", patch)

    def active(self) -> list[str]:
        """Kubernetes Jobs of it that are at work."""
        jobs = self.namespace.get("jobs", "-l", "utaforge/job=weekly")["items"]
        return [job["metadata"]["name"] for job in jobs if job["status"].get("active")]

    def read(self, run: str, path: str) -> Any:
        """A JSON file of a run; None if it is not there."""
        found = Run(self._store(f"runs/{run}")).store.get_or_none(path)
        return json.loads(found) if found else None

    def champion(self) -> str:
        """The run that the book of champions ends with."""
        book = self._store("champions/weekly")
        return json.loads(book.get([entry.path for entry in book.list()][-1]))["run"]

    def _store(self, path: str) -> Store:
        return open_store(self.place.store).at(path)


def a_schedule(place: Place, images: Images, folder: Path) -> Schedule:
    """A schedule of which nothing is told yet.

    Args:
        place: where.
        images: what its pods run.
        folder: an empty one.
    """
    (folder / "profiles").mkdir()
    (folder / "profiles" / "small.yaml").write_text(SMALL)
    utaforge = Utaforge(
        folder, {name: place.utaforge.environment[name] for name in ("KUBECONFIG", *place.team.store_keys)}
    )
    return Schedule(place, utaforge, images)

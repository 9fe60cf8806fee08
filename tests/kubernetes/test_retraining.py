"""A CronJob that retrains in the cluster: for the better, for the worse, in vain, and never twice at once."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from launcher.runs import Run
from tests.kubernetes.cluster.access import eventually
from tests.kubernetes.images import Images
from tests.kubernetes.overlay import Namespace
from tests.kubernetes.place import Place
from trainer.store import Store, open_store

pytestmark = pytest.mark.timeout(3600)
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

    Attributes:
        champions: the run that was the champion at the end of each chapter.
        verdicts: what was said of the newest run then, if anything.
    """

    place: Place
    launcher_image: str
    champions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Any] = field(default_factory=dict)

    @property
    def namespace(self) -> Namespace:
        return self.place.team.namespace

    def write(self, lr: str) -> str:
        """The job file."""
        place = self.place
        text = JOB.format(store=place.store, lr=lr, namespace=place.namespace, image=place.image)
        path = place.utaforge.folder / "weekly.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def prepare(self, job: str, *overrides: str) -> None:
        """Publish songs, as people do from their machine."""
        said = self.place.utaforge("prepare", job, *(part for override in overrides for part in ("--set", override)))
        assert said.code == 0, said.text

    def chapter(self, name: str, lr: str, songs: int, run: str, ended: Callable[[], bool]) -> None:
        """With new songs and this learning rate, let the clock start ``run``; returns once that has ended."""
        job = self.write(lr)
        self.prepare(job, f"data.prepare.source.songs={songs}")
        manifests = self.place.utaforge.output("render", "cronjob", job, "--image", self.launcher_image)
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


@pytest.fixture(scope="module")
def schedule(place: Place, images: Images) -> Schedule:
    made = Schedule(place, images.name("launcher"))
    job = made.write("1.0e-2")
    made.prepare(job, *(override.replace("STORE", place.store) for override in HELD_OUT))
    made.chapter("better", "1.0e-2", 4, "weekly", lambda: made.read("weekly", "verdict.json") is not None)
    made.chapter("worse", "30", 5, "weekly-2", lambda: made.read("weekly-2", "verdict.json") is not None)
    made.chapter("in vain", "1.0e+30", 6, "weekly-3", lambda: made.read("weekly-3", "failure.json") is not None)
    made.namespace.kubectl("delete", "cronjob", "weekly-retrain")
    return made


def test_one_that_is_better_is_promoted(schedule: Schedule) -> None:
    assert schedule.verdicts["better"]["promoted"]
    assert schedule.champions["better"] == "weekly"


def test_one_that_is_worse_is_rejected_and_starts_from_the_champion(schedule: Schedule) -> None:
    assert not schedule.verdicts["worse"]["promoted"]
    assert schedule.read("weekly-2", "job.json")["method"]["init"].endswith("/runs/weekly/adapter")
    assert schedule.champions["worse"] == "weekly"


def test_one_that_fails_leaves_the_champion_and_a_failed_kubernetes_job(schedule: Schedule) -> None:
    assert schedule.verdicts["in vain"] is None
    assert schedule.champions["in vain"] == "weekly"
    events = schedule.namespace.get("events")["items"]
    assert any(
        event["reason"] == "BackoffLimitExceeded" and "weekly-retrain" in event["involvedObject"]["name"]
        for event in events
    )


def test_one_that_overlaps_is_not_started(schedule: Schedule) -> None:
    events = schedule.namespace.get("events")["items"]
    assert any(event["reason"] == "JobAlreadyActive" for event in events)


def test_mlflows_alias_is_the_champion(schedule: Schedule) -> None:
    path = "/api/2.0/mlflow/registered-models/alias?name=weekly&alias=champion"
    status, answer = schedule.place.team.ask(path, user=schedule.place.team.trainer)
    assert status == 200, answer
    tracked = schedule.read("weekly", "mlflow.json")["run_id"]
    assert json.loads(answer)["model_version"]["run_id"] == tracked

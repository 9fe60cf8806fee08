"""Runs that are sent to a real cluster without looking whether they can go well."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.backends import open_backend
from launcher.backends.kubernetes import standing
from launcher.plan import plan
from launcher.runs import Run, create_or_resume
from launcher.snapshot import gather
from launcher.why import Cause, diagnose
from tests.kubernetes.place import Place
from tests.waiting import eventually
from trainer.spec import load_job

JOB = """\
name: {name}
store: {store}
model: {{family: musicgen, pretrained: "builtin:pocket", segment_seconds: 10}}
method: {{type: lora, rank: 8, targets: [q_proj, v_proj]}}
data:
  train: [{{dataset: {store}/datasets/歌}}]
  validation: {{fraction: 0.25, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 8}}}}
train: {{steps: 40, batch: {{seconds: 40}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: 10}}
validation: {{every: 40, prompts: [{{tags: "元気な 祭り", seconds: 2, seed: 1}}]}}
cluster:
  backend: kubernetes
  profile: tiny
  workers: 1
  namespace: {namespace}
  image: {image}
  secrets: [utaforge-store]
"""
TINY = "cores: 0.05\nram_gib: 1.75\ndisk_gib: 4\n"


def gpu_nodes(labels: str, gpus: int = 1) -> str:
    """A profile of small pods on nodes with ``labels``, which say nothing else of themselves."""
    return f"""\
gpu: T4
gpus: {gpus}
gpu_gib: 14.6
tflops: 65
{TINY}nodes:
  - labels: {labels}
"""


class Situations:
    """Sends runs of a small job, from a folder with a profile for small pods.

    Args:
        folder: an empty one.
        store: where the runs lie.
        namespace: with a service account ``utaforge-trainer`` and a secret ``utaforge-store``.
        image: of the trainer.
    """

    def __init__(self, folder: Path, store: str, namespace: str, image: str) -> None:
        self._folder, self._job = folder, folder / "job.yaml"
        self._fields = {"store": store, "namespace": namespace, "image": image}
        (folder / "profiles").mkdir(exist_ok=True)
        (folder / "profiles" / "tiny.yaml").write_text(TINY)

    def profile(self, name: str, text: str) -> None:
        """Put a profile beside the job."""
        (self._folder / "profiles" / f"{name}.yaml").write_text(text)

    @contextmanager
    def sent(self, name: str, *overrides: str) -> Iterator[Run]:
        """A run called ``name`` that the cluster has accepted; afterwards it is cancelled."""
        self._job.write_text(JOB.format(name=name, **self._fields), encoding="utf-8")
        job = load_job(self._job, overrides)
        planned = plan(job, self._folder)
        run = create_or_resume(job, planned.as_json()).run
        with open_backend(job, planned, {}) as backend:
            jobs = backend.start(print)
            attempt = run.begin_attempt(backend, jobs)
            jobs.submit(attempt.submission, [backend.python, "-m", "trainer.driver", run.url])
        try:
            yield run
        finally:
            if run.at_work():
                run.cancel()


def cause_of(run: Run, expected: str, seconds: float = 300.0, among: int | None = 1) -> Cause:
    """The cause that says ``expected``, once it is ``among`` the likeliest (None: among all), or fails."""

    def found() -> Cause | None:
        return next((cause for cause in diagnose(gather(run))[:among] if expected in cause.what), None)

    cause = eventually(found, seconds)
    assert cause is not None
    return cause


def ended_with_its_first_cluster(place: Place, name: str) -> None:
    """Fails unless KubeRay takes the run for one that was stopped, and has paid for no second cluster."""
    (rayjob,) = eventually(lambda: [each for each in place.objects("rayjobs", name) if standing(each).over])
    assert (rayjob["status"]["jobStatus"], rayjob["status"].get("failed", 0)) == ("STOPPED", 0)
    assert len(place.objects("rayclusters", name)) <= 1

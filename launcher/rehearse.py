"""Rehearsing: jobs shrunk to this machine and run for real, before money is spent on them.

A rehearsal keeps the family, the method and the shape of the job. Weights are tiny and random, the songs are a few of
the job's own where this machine has them and the demo's where not, and two Ray workers make a few steps, amid which one
of them is killed.
"""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.backends.base import Say
from launcher.backends.local import LocalBackend
from launcher.differences import changes
from launcher.plan import Plan
from launcher.plan import plan as make_plan
from launcher.runs import Run, create_or_resume
from launcher.submit import Interrupted, environment, home, see_through
from trainer.spec import ClusterError, Job, JobError, dump_job, job_from_json
from trainer.spec.availability import unavailable
from trainer.spec.families import codec_of
from trainer.spec.model import Lora

WORKERS, STEPS, COMMIT_EVERY, SONGS = 2, 20, 5, 8
SEGMENT_SECONDS, BATCH_SECONDS = 20.0, 40.0
SECONDS_OF_SONG = 2.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Rehearsal:
    """What came of one job.

    Attributes:
        name: the job's.
        folder: with its store and its MLflow file.
        seconds: it took.
        exercised: what has been run for real.
        replaced: every field that had another value, as ``path: in the job → in the rehearsal``.
    """

    name: str
    folder: Path
    seconds: float
    exercised: list[str]
    replaced: list[str]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "folder": str(self.folder)}


def rehearse(jobs: Sequence[Job], say: Say) -> Iterator[Rehearsal]:
    """Rehearse each job, all on one local cluster.

    Raises:
        UtaforgeError: what ended a rehearsal; the same would end the job.
        JobError: two of them have one name.
    """
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise JobError(f"{count} of these jobs are called {name}", "rehearse one of them, or rename the others")
    folders = [home() / "rehearsals" / job.name for job in jobs]
    shrunken = [shrunk(job, folder) for job, folder in zip(jobs, folders, strict=True)]
    with LocalBackend(WORKERS, 0, environment(WORKERS)) as backend:
        cluster = backend.start(say)
        for job, small, folder in zip(jobs, shrunken, folders, strict=True):
            started = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            planned = make_plan(small)
            run = create_or_resume(small, planned.as_json()).run
            say(f"rehearsing {job.name}")
            with _killing(backend, run) as death:
                try:
                    see_through(run, backend, cluster, say)
                except Interrupted:
                    raise Interrupted(f"the rehearsal of {job.name} was stopped", "rehearse it again") from None
            if not death:
                raise ClusterError(
                    f"the rehearsal of {job.name} was over before a rank could be killed", "rehearse it again"
                )
            exercised = _exercised(small, planned, run, death[0])
            yield Rehearsal(job.name, folder, time.monotonic() - started, exercised, list(changes(job, small)))


def shrunk(job: Job, folder: Path) -> Job:
    """``job`` as it is rehearsed, with everything it writes below ``folder``.

    Raises:
        JobError: what makes it what it is is not available yet, so that a rehearsal would prove nothing.
    """
    told: dict[str, Any] = json.loads(dump_job(job))
    told["store"] = f"file://{folder}"
    told["model"] |= {
        "pretrained": "random:tiny",
        "codec": {"name": codec_of(job.model)},
        "base_precision": "auto",
        "segment_seconds": min(job.model.segment_seconds, SEGMENT_SECONDS),
    }
    for _, name, *_ in job.model.urls():
        if name not in ("pretrained", "codec"):
            told["model"][name] = None
    told["model"].pop("ssl_features", None)  # those that songs bring are of whole songs, for the whole network
    if isinstance(job.method, Lora):
        told["method"]["init"] = None
    told["data"] |= {
        "train": [{"dataset": f"file://{folder}/songs"}],
        "validation": {"fraction": 0.25, "by": "song"},
        "prepare": _songs(job),
    }
    told["train"] |= {"steps": STEPS, "batch": {"seconds": BATCH_SECONDS}, "precision": "auto", "log_every": 1}
    told["train"]["schedule"]["warmup"] = min(job.train.schedule.warmup, STEPS)
    told["checkpoint"]["every"] = COMMIT_EVERY
    told["validation"] |= {"every": STEPS, "stop_if": []}
    told["validation"]["prompts"] = [
        prompt | {"seconds": SECONDS_OF_SONG, "style": None, "style_text": None, "speaker": None}
        for prompt in told["validation"]["prompts"][:WORKERS]
    ]
    told["tracking"] = {"mlflow": f"sqlite:///{folder}/mlflow.db"}
    told["cluster"] = {"backend": "local", "profile": "cpu", "workers": WORKERS}
    told |= {"budget": {}, "retrain": None}
    small = job_from_json(json.dumps(told))
    if later := unavailable(small):
        told_so = "\n  ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in later)
        raise JobError(f"{job.name} cannot be rehearsed:\n  {told_so}", "change the job, then rehearse it again")
    return small


def _songs(job: Job) -> dict[str, Any]:
    """``data.prepare`` of the rehearsal: the job's own, cut short, if it can be done on this machine."""
    prepare = job.data.prepare
    possible = prepare and not any(path[:2] == ("data", "prepare") for path, _ in unavailable(job))
    path = getattr(prepare.source, "path", None) if prepare else None
    if prepare and possible and (path is None or Path(path).exists()):
        return prepare.model_copy(update={"limit": SONGS}).model_dump(mode="json")
    return {"source": {"type": "demo", "style": "b", "songs": SONGS}}


@contextmanager
def _killing(backend: LocalBackend, run: Run) -> Generator[list[int]]:
    """Kill one rank as soon as there is a commit; the list then holds the step of that commit."""
    death: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            step = run.newest_commit()
            if step and (ranks := backend.workers()):
                os.kill(ranks[-1], signal.SIGKILL)
                death.append(step)
                return

    thread = threading.Thread(target=watch, name="killer", daemon=True)
    thread.start()
    try:
        yield death
    finally:
        over.set()
        thread.join()


def _exercised(job: Job, planned: Plan, run: Run, killed_after: int) -> list[str]:
    result = run.result
    assert result is not None, "a run that was seen through has its result"
    songs = [entry.path for entry in run.store.list(f"audio/step-{STEPS:08d}") if not entry.path.endswith(".json")]
    what = "adapter" if isinstance(job.method, Lora) else "model"
    assert job.data.prepare is not None
    source = job.data.prepare.source
    return [
        f"the songs of source {source.type} through codec {codec_of(job.model)} into shards of {job.model.family}",
        f"{STEPS} steps of {job.method.type} on {planned.ranks} ranks by {planned.strategy} in {planned.precision}",
        f"held-out loss {result['loss_before']:.3f} → {result['loss_after']:.3f}",
        f"a checkpoint every {COMMIT_EVERY} steps; a rank killed after step {killed_after}, and going on from there",
        f"validation audio: {len(songs)} songs" if songs else "no validation audio, since the job has no prompts",
        f"metrics in MLflow; the {what} in {run.store.at(what).url}",
    ]

"""Taking runs down: what they have on clusters goes, their run directories stay."""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launcher.backends.base import Say
from launcher.backends.kubernetes import ANSWER_SECONDS, standing
from launcher.backends.kubernetes_api import Api
from launcher.render import inside
from launcher.render.rayjob import GROUP, JOB, PLURAL, RUN, SUBMISSION, VERSION
from launcher.runs import READERS, Run
from trainer.spec.errors import ClusterError, UtaforgeError
from trainer.store import open_store

log = logging.getLogger(__name__)
GONE_SECONDS = 300.0
"""Workers have a grace period of two minutes, and Kubernetes takes its time to notice."""
POLL_SECONDS = 0.5
_RAYJOBS = f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/{PLURAL}"
_LEFT = (f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/rayclusters", "/api/v1/namespaces/{}/pods")
Place = tuple[str | None, str]
"""Context of the kubeconfig, and namespace."""


@dataclass(frozen=True)
class Remains:
    """What there is of a run beside its run directory.

    Attributes:
        run: the run.
        at_work: whether it runs.
        rayjobs: what it has on Kubernetes: where, and the RayJob's name.
    """

    run: Run
    at_work: bool
    rayjobs: tuple[tuple[Place, str], ...]

    def __str__(self) -> str:
        named = [f"RayJob {name} in namespace {namespace}" for (_, namespace), name in self.rayjobs]
        return f"run {self.run.name}: {', '.join([*(['at work'] if self.at_work else []), *named])}"


def remains(runs: Sequence[Run]) -> list[Remains]:
    """What there is of ``runs``; those of which nothing is left are not among them.

    Raises:
        ClusterError: a cluster that some of them were submitted to cannot be asked.
    """
    with ThreadPoolExecutor(READERS) as pool:
        places = {place for found in pool.map(_places, runs) for place in found}
        there = {uid: (place, *named) for place in places for uid, *named in _rayjobs(place)}  # two contexts may be one
        at_work = list(pool.map(_at_work, runs))
    found = [
        Remains(run, busy, tuple((place, name) for place, name, url in there.values() if url == run.url))
        for run, busy in zip(runs, at_work, strict=True)
    ]
    return [one for one in found if one.at_work or one.rayjobs]


def take_down(found: Iterable[Remains], say: Say) -> None:
    """End and remove ``found``; returns when no pod of it is left.

    Raises:
        ClusterError: a run is at work where this machine cannot end it, or something does not go.
    """
    leaving: dict[Place, list[str]] = {}
    for one in found:
        if one.at_work:
            one.run.cancel()
        for place, name in one.rayjobs:
            Api(place[0]).delete(f"{_RAYJOBS.format(place[1])}/{name}")
            leaving.setdefault(place, []).append(name)
        say(f"run {one.run.name} is down; its run directory stays: {one.run.url}")
    for place, names in leaving.items():
        _see_off(place, names, say)


def tidy(run: Run) -> None:
    """Remove the RayJobs of ended submissions of the job of ``run``, which would pile up to the namespace's quota.

    A RayJob stays while only it tells how its run ended: nothing is lost. What cannot be asked or removed stays too.

    Args:
        run: that is about to be submitted; its attempt has begun.
    """
    attempt = run.newest_attempt()
    if attempt is None or attempt.backend != "kubernetes":
        return
    path = _RAYJOBS.format(attempt.namespace)
    try:
        api = Api(attempt.context, ANSWER_SECONDS)
        for rayjob in api.list(path, labelSelector=f"{JOB}={run.job.name}"):
            url, name = inside(rayjob, "metadata", "annotations", RUN) or "", rayjob["metadata"]["name"]
            same_store = url.rpartition("/")[0] == run.url.rpartition("/")[0]
            if same_store and standing(rayjob).over and _tells_end(Run(open_store(url)), name):
                api.delete(f"{path}/{name}")
    except UtaforgeError as error:
        log.debug("not tidied up: %s", error.problem)


def _tells_end(run: Run, submission: str) -> bool:
    """Whether the run directory says how a submission has ended, or a later one has taken its place."""
    attempt = run.newest_attempt()
    if attempt is None or attempt.submission != submission or attempt.stopped:
        return True
    return run.finished or run.failure(attempt) is not None


def _at_work(run: Run) -> bool:
    return run.at_work() is not None


def _places(run: Run) -> set[Place]:
    return {
        (attempt.context, attempt.namespace or "") for attempt in run.every_attempt() if attempt.backend == "kubernetes"
    }


def _rayjobs(place: Place) -> list[tuple[str, str, str]]:
    """(uid, name, run's URL) of every RayJob of ours in a namespace."""
    listed = Api(place[0]).list(_RAYJOBS.format(place[1]), labelSelector=SUBMISSION)
    known = [each["metadata"] for each in listed]
    return [(each["uid"], each["name"], inside(each, "annotations", RUN) or "") for each in known]


def _see_off(place: Place, names: Sequence[str], say: Say) -> None:
    """Wait until what the RayJobs ``names`` owned is gone."""
    api, namespace = Api(place[0]), place[1]
    selectors = (f"ray.io/originated-from-cr-name in ({','.join(names)})", f"{SUBMISSION} in ({','.join(names)})")
    deadline, said = time.monotonic() + GONE_SECONDS, 0
    while True:
        left = [
            each["metadata"]["name"]
            for path, selector in zip(_LEFT, selectors, strict=True)
            for each in api.list(path.format(namespace), labelSelector=selector)
        ]
        if not left:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"these do not go from namespace {namespace}: {', '.join(left)}",
                "see kubectl describe of them; a node may be gone: kubectl delete --force",
            )
        if len(left) != said:
            said = len(left)
            say(f"waiting until {said} objects in namespace {namespace} are gone: workers end politely")
        time.sleep(POLL_SECONDS)

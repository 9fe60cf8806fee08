"""Submissions that a cluster, a person or a missing right cuts off: never two at once, and nothing half-made."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from launcher.backends.kubernetes import KubernetesBackend, KubernetesJobs
from launcher.backends.kubernetes_api import Api
from launcher.cli import run as utaforge
from launcher.down import remains, tidy
from launcher.plan import plan
from launcher.render.rayjob import Manifest, Submission, manifests
from launcher.retrain import retrain
from launcher.runs import Busy, Run, create_or_resume
from launcher.submit import see_through
from tests.unit.launcher.server import Server
from tests.unit.launcher.test_kubernetes import RAYJOBS, forbidden, here
from trainer.spec import ClusterError, Job, UtaforgeError
from trainer.store import open_store

Jobs = Callable[..., Job]
PODS, RAYCLUSTERS = "/api/v1/namespaces/uta/pods", "/apis/ray.io/v1/namespaces/uta/rayclusters"
BUDGETS = "/apis/policy/v1/namespaces/uta/poddisruptionbudgets"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/uta/networkpolicies"


class Submitting:
    """A run of the demo job whose first attempt is about to be handed over to ``server``, without patience."""

    def __init__(self, job: Job, store: str, interrupted: bool = False) -> None:
        self.job, on_pods = job, here(job).model_copy(update={"store": store})
        self.planned = plan(on_pods)
        self.run = create_or_resume(job, self.planned.as_json()).run
        self.backend = KubernetesBackend(on_pods, self.planned)
        self.backend.start(lambda _: None)
        self.name = self.backend.submission(self.run.url, 1)
        self.path = f"{RAYJOBS}/{self.name}"
        self._interrupted = interrupted

    def hand_over(self) -> None:
        see_through(self.run, self.backend, KubernetesJobs("uta", Api(patience=0), self._render), lambda _: None)

    def _render(self, name: str, argv: Any) -> list[Manifest]:
        if self._interrupted:
            raise KeyboardInterrupt
        return manifests(here(self.job), self.planned, Submission(name, argv[-1], argv))

    def again(self) -> Run:
        return create_or_resume(self.job, self.planned.as_json()).run

    @property
    def marked_stopped(self) -> bool:
        attempt = self.run.newest_attempt()
        assert attempt
        return attempt.stopped


@pytest.fixture
def submitting(kubeconfig: object, job: Jobs, store: str) -> Submitting:
    return Submitting(job(), store)


def rayjob(run_url: str, name: str, state: str, job: str = "") -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "uid": "一", "annotations": {"utaforge/run": run_url}, "labels": {}},
        "spec": {},
        "status": {"jobDeploymentStatus": state, "jobStatus": job},
    }


@pytest.mark.parametrize(("interrupted", "code"), [(False, 5), (True, 130)], ids=["outage", "Ctrl-C"])
def test_what_may_have_been_accepted_is_not_started_again(
    server: Server, kubeconfig: object, job: Jobs, store: str, interrupted: bool, code: int
) -> None:
    begun = Submitting(job(), store, interrupted)
    running = 200, rayjob(begun.run.url, begun.name, "Running")
    server.answers |= {f"POST {RAYJOBS}": [None], f"DELETE {begun.path}": [None], f"GET {begun.path}": [None, running]}
    with pytest.raises(UtaforgeError, match=f"may have been accepted nevertheless, as {begun.name}") as caught:
        begun.hand_over()
    assert caught.value.exit_code == code
    assert "utaforge cancel demo" in caught.value.cure
    assert not begun.marked_stopped
    with pytest.raises(Busy, match="run demo is at work already"):
        begun.again()


def test_what_was_taken_back_is_stopped_and_may_start_again(server: Server, submitting: Submitting) -> None:
    server.answers |= {f"POST {RAYJOBS}": [None], f"DELETE {submitting.path}": [(200, {})]}
    with pytest.raises(ClusterError, match="cannot be reached"):
        submitting.hand_over()
    assert submitting.marked_stopped
    assert submitting.again().name == "demo"


def test_a_laptop_that_dies_before_it_has_sent_anything_keeps_the_run_for_two_minutes(submitting: Submitting) -> None:
    submitting.run.begin_attempt(submitting.backend, KubernetesJobs("uta", Api(patience=0)))
    with pytest.raises(Busy, match="run demo is at work already"):
        submitting.again()
    assert submitting.run.store.local
    then = time.time() - 121
    os.utime(submitting.run.store.local / "attempts" / "0001.json", (then, then))
    assert submitting.again().name == "demo"


@pytest.mark.parametrize("path", [RAYJOBS, BUDGETS, POLICIES])
@pytest.mark.parametrize("deletable", [True, False], ids=["", "and no right to delete"])
def test_a_right_to_create_that_lacks_is_told_and_leaves_nothing_half_made(
    server: Server, submitting: Submitting, path: str, deletable: bool
) -> None:
    made = 201, rayjob(submitting.run.url, submitting.name, "Initializing")
    server.answers |= {f"POST {each}": [made] for each in (RAYJOBS, BUDGETS, POLICIES)}
    server.answers[f"POST {path}"] = [forbidden("create", path.rpartition("/")[2])]
    server.answers[f"DELETE {submitting.path}"] = [(200, {}) if deletable else forbidden("delete", "rayjobs")]
    there = path != RAYJOBS and not deletable
    server.answers[f"GET {submitting.path}"] = [made if there else (404, {})]
    with pytest.raises(ClusterError, match="cannot create resource") as caught:
        submitting.hand_over()
    assert ("DELETE", submitting.path) in server.asked
    assert submitting.marked_stopped is not there
    assert ("may have been accepted" in str(caught.value)) is there


def test_following_without_the_right_to_get_is_told_and_the_run_goes_on(server: Server, submitting: Submitting) -> None:
    server.answers[f"POST {RAYJOBS}"] = [(201, rayjob(submitting.run.url, submitting.name, ""))]
    server.answers |= {f"POST {each}": [(201, {})] for each in (BUDGETS, POLICIES)}
    server.answers[f"GET {submitting.path}"] = [forbidden("get", "rayjobs")]
    with pytest.raises(ClusterError, match=r"cannot get resource .*\n.* goes on unseen"):
        submitting.hand_over()
    assert not submitting.marked_stopped
    assert "DELETE" not in {method for method, _ in server.asked}


def test_down_names_a_rayjob_once_to_which_two_contexts_lead(
    server: Server, submitting: Submitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context in (None, "uta"):  # from a pod, and from a laptop
        monkeypatch.setattr(submitting.backend, "context", context)
        attempt = submitting.run.begin_attempt(submitting.backend, KubernetesJobs("uta", Api()))
        submitting.run.mark_stopped(attempt)
    there = rayjob(submitting.run.url, submitting.name, "Running")
    server.answers |= {f"GET {RAYJOBS}": [(200, {"items": [there]})], f"GET {submitting.path}": [(200, there)]}
    (found,) = remains([submitting.run])
    assert [name for _, name in found.rayjobs] == [submitting.name]


NAME = "NAME"
REFUSED = [
    ("status", f"GET {RAYJOBS}/{NAME}", "get rayjobs", 0, "running"),
    ("list", f"GET {RAYJOBS}", "list rayjobs", 0, "running"),
    ("logs -f", f"GET {RAYJOBS}/{NAME}", "get rayjobs", 5, "goes on unseen"),
    ("logs -f", f"GET {PODS}", "list pods", 0, "run demo is"),
    ("cancel", f"DELETE {RAYJOBS}/{NAME}", "delete rayjobs", 5, "cannot delete resource"),
    ("cancel", f"GET {RAYJOBS}/{NAME}", "get rayjobs", 5, "cannot get resource"),
    ("down", f"GET {RAYJOBS}", "list rayjobs", 5, "cannot list resource"),
    ("down", f"DELETE {RAYJOBS}/{NAME}", "delete rayjobs", 5, "cannot delete resource"),
    ("down", f"GET {RAYCLUSTERS}", "list rayclusters", 5, "cannot list resource"),
    ("down", f"GET {PODS}", "list pods", 5, "cannot list resource"),
    ("why", f"GET {RAYJOBS}/{NAME}", "get rayjobs", 0, "cannot get resource"),
    *(
        ("why", f"GET {path}", f"list {path.rpartition('/')[2]}", 0, "run demo: running")
        for path in (RAYCLUSTERS, PODS, "/api/v1/namespaces/uta/events", "/api/v1/namespaces/uta/resourcequotas")
    ),
]


@pytest.mark.parametrize(
    ("command", "asked", "right", "code", "told"), REFUSED, ids=[f"{c}: {r}" for c, _, r, *_ in REFUSED]
)
def test_a_right_that_lacks_is_told_with_its_cure_or_done_without(
    server: Server,
    submitting: Submitting,
    store: str,
    capsys: pytest.CaptureFixture[str],
    command: str,
    asked: str,
    right: str,
    code: int,
    told: str,
) -> None:
    submitting.run.begin_attempt(submitting.backend, KubernetesJobs("uta", Api()))
    verb, *options = command.split()
    states = {"logs": ["Running", "Running", "Complete"], "why": ["Running"]}.get(verb, ["Running", None])
    seen = [rayjob(submitting.run.url, submitting.name, state) if state else None for state in states]
    server.answers |= {
        f"GET {RAYJOBS}": [(200, {"items": seen[:1]})],
        f"GET {submitting.path}": [(200, each) if each else (404, {}) for each in seen],
        f"DELETE {submitting.path}": [(200, {})],
    }
    server.answers[asked.replace(NAME, submitting.name)] = [forbidden(*right.split())]
    names = [] if verb == "list" else ["demo"]
    assert utaforge([verb, *names, *options, *(["--yes"] if verb == "down" else []), "--store", store]) == code
    said = "".join(capsys.readouterr())
    assert told in said
    assert code == 0 or "whoever runs this cluster has to give that right" in said
    assert "Traceback" not in said


def test_retrain_looks_before_it_claims_anything(server: Server, kubeconfig: object, job: Jobs, store: str) -> None:
    server.answers["/version"] = [(200, {})]
    for name in ("demo", "取り置き"):
        open_store(f"{store}/datasets/{name}").put("versions/000001.json", b'{"digest": "a"}')
    retrained = job("retrain={cron: '0 3 * * 0'}", f"data.validation={{dataset: {store}/datasets/取り置き}}")
    with pytest.raises(ClusterError, match="the cluster lacks KubeRay"):
        retrain(here(retrained).model_copy(update={"store": store}), lambda *_: 0, lambda _: None)
    assert open_store(store).folders("runs") == []


def test_submitting_removes_the_rayjobs_of_what_has_ended_and_whose_run_directory_says_how(
    server: Server, submitting: Submitting, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = KubernetesJobs("uta", Api())

    def ended(name: str, **files: dict[str, Any]) -> dict[str, Any]:
        run = create_or_resume(submitting.job, {}, name).run
        attempt = run.begin_attempt(submitting.backend, jobs)
        told = json.loads(run.store.get("attempts/0001.json"))
        run.store.put("attempts/0001.json", json.dumps({**told, "time": time.time() - 3600}).encode())
        for kind, content in files.items():
            run.store.put(f"{kind}.json", json.dumps(content, ensure_ascii=False).encode())
        return rayjob(run.url, attempt.submission, "Complete", "STOPPED")

    finished = ended("demo-2", result={"steps": 120, "loss": 1.0, "attempt": 1, "backend": "kubernetes", "time": 1.0})
    failure = {"time": 1.0, "attempt": 1, "problem": "音が出ない", "cure": "弦を張る", "exit_code": 6}
    failed, unexplained = ended("demo-3", failure=failure), ended("demo-4")
    running = rayjob(f"{store}/runs/demo-5", "uta-running-1", "Running")
    elsewhere = rayjob("s3://他/runs/demo", "uta-elsewhere-1", "Complete", "SUCCEEDED")
    server.answers[f"GET {RAYJOBS}"] = [(200, {"items": [finished, failed, unexplained, running, elsewhere]})]
    submitting.run.begin_attempt(submitting.backend, jobs)
    tidy(submitting.run)
    gone = {path for method, path in server.asked if method == "DELETE"}
    assert gone == {f"{RAYJOBS}/{each['metadata']['name']}" for each in (finished, failed)}
    for name, state in (("demo-2", "finished"), ("demo-3", "failed")):
        assert utaforge(["status", name, "--store", store, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == state
    assert utaforge(["why", "demo-3", "--store", store]) == 0
    assert "弦を張る" in capsys.readouterr().out
    server.answers[f"GET {RAYJOBS}"] = [forbidden("list", "rayjobs")]
    tidy(submitting.run)


def test_a_run_that_was_tidied_away_while_nobody_looked_has_its_result(server: Server, submitting: Submitting) -> None:
    server.answers[f"POST {RAYJOBS}"] = [(201, rayjob(submitting.run.url, submitting.name, ""))]
    server.answers |= {f"POST {each}": [(201, {})] for each in (BUDGETS, POLICIES)}
    submitting.run.store.put("result.json", b'{"steps": 120}')
    submitting.hand_over()


def test_a_run_on_kubernetes_that_does_not_stop_has_a_cure_of_its_own(
    server: Server, submitting: Submitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.runs.STOP_SECONDS", 0.0)
    submitting.run.begin_attempt(submitting.backend, KubernetesJobs("uta", Api()))
    server.answers[f"GET {submitting.path}"] = [(200, rayjob(submitting.run.url, submitting.name, "Running"))]
    server.answers[f"DELETE {submitting.path}"] = [(200, {})]
    with pytest.raises(ClusterError, match="run demo does not stop") as caught:
        submitting.run.cancel()
    assert f"kubectl -n uta describe rayjob {submitting.name}" in caught.value.cure
    assert "Ctrl-C" not in caught.value.cure

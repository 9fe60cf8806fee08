"""The client against an HTTP server that answers as told: refusals, broken connections, objects that change."""

import base64
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import registry
from launcher.backends.kubernetes import KubernetesJobs
from launcher.backends.kubernetes_api import Api, Refused
from launcher.backends.kubernetes_checks import amount, checks
from launcher.plan import plan
from launcher.render.rayjob import Submission, manifests
from launcher.runs import Run
from launcher.snapshot import gather
from launcher.why import diagnose
from tests.unit.launcher.server import Answer, Server
from trainer.spec import ClusterError, Job, UtaforgeError
from trainer.spec.cluster import Kubernetes
from trainer.store import open_store

Jobs = Callable[..., Job]
RAYJOBS = "/apis/ray.io/v1/namespaces/uta/rayjobs"


REFUSALS = [
    (401, "Unauthorized", "credentials have expired"),
    (403, 'rayjobs.ray.io is forbidden: User "歌" cannot create resource "rayjobs"', "has to give that right"),
    (403, "pods is forbidden: exceeded quota: gpus", "ResourceQuota"),
    (404, 'namespaces "uta" not found', "create namespace"),
    (404, "404 page not found", "lacks KubeRay"),
    (400, 'strict decoding error: unknown field "spec.preRunningDeadlineSeconds"', "too old"),
]


@pytest.mark.parametrize(("code", "message", "cure"), REFUSALS, ids=[cure for *_, cure in REFUSALS])
def test_a_refusal_is_told_with_its_cure(server: Server, api: Api, code: int, message: str, cure: str) -> None:
    server.answers[RAYJOBS] = [(code, message if code == 404 and "page" in message else {"message": message})]
    with pytest.raises(Refused) as caught:
        api.create(RAYJOBS, {})
    assert message in caught.value.problem
    assert cure in caught.value.cure
    assert "secret" not in str(caught.value)


def test_an_overloaded_server_and_a_broken_connection_are_asked_again_unseen(server: Server, api: Api) -> None:
    server.answers[RAYJOBS] = [(429, {"message": "slow down"}), (500, {"message": "etcd"}), None, (201, {"made": "歌"})]
    assert api.create(RAYJOBS, {"a": 1}) == {"made": "歌"}
    assert len(server.asked) == 4


def test_a_quota_that_is_not_counted_yet_is_waited_for(server: Server, api: Api) -> None:
    unknown = 'rayjobs.ray.io "uta-1" is forbidden: status unknown for quota: 歌, resources: count/rayjobs.ray.io'
    server.answers[RAYJOBS] = [(403, {"message": unknown}), (201, {"made": "歌"})]
    assert api.create(RAYJOBS, {"a": 1}) == {"made": "歌"}
    server.answers[RAYJOBS] = [(403, {"message": unknown})]
    with pytest.raises(ClusterError, match="not counted for yet"):
        Api(patience=0).create(RAYJOBS, {})


def test_what_is_there_already_is_none_and_what_is_gone_need_not_be_deleted(server: Server, api: Api) -> None:
    server.answers[RAYJOBS] = [(409, {"message": 'rayjobs.ray.io "uta-1" already exists'})]
    assert api.create(RAYJOBS, {}) is None
    api.delete(f"{RAYJOBS}/uta-1")
    assert api.get(f"{RAYJOBS}/uta-1") is None


def test_nothing_listening_is_told_at_once_where_there_is_no_patience(server: Server, kubeconfig: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    kubeconfig.write_text(kubeconfig.read_text().replace(server.url, gone))
    with pytest.raises(ClusterError, match=r"cannot be reached: .*refused"):
        Api(patience=0).get("/version")


def test_without_a_kubeconfig_or_its_context_the_cure_is_to_get_one(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=r"does not lead to a cluster: .*歌"):
        Api("歌")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig.with_name("無い")))
    with pytest.raises(ClusterError, match=r"there is no kubeconfig at .*無い"):
        Api()


BROKEN = {
    "YAML": ("clusters: [\n  token: ひみつ: x", "line 2 is no YAML"),
    "a bare string": ("歌", "it has not the fields of a kubeconfig"),
    "empty": ("", "file is empty"),
    "base64": ({"certificate-authority-data": "abc"}, {"token": "ひみつ"}, "is no base64"),
    "a field": ({}, None, "Expected key user"),
    "a plug-in": (
        {},
        {"exec": {"command": "無い-plugin", "apiVersion": "client.authentication.k8s.io/v1"}},
        "無い-plugin",
    ),
    "a token's file": ({}, {"tokenFile": "/無い"}, "No such file or directory: '/無い'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_kubeconfig_is_told_with_a_cure_and_without_its_secrets(kubeconfig: Path, kind: str) -> None:
    *parts, told = BROKEN[kind]
    text: Any = parts[0]
    if len(parts) > 1:
        user = {"user": parts[1]} if parts[1] else {"token": "ひみつ"}
        changed = json.loads(kubeconfig.read_text(encoding="utf-8"))
        changed["clusters"][0]["cluster"] = {"server": "https://127.0.0.1:1", **parts[0]}
        changed["users"] = [{"name": "歌", **user}]
        text = json.dumps(changed)
    kubeconfig.write_text(text, encoding="utf-8")
    with pytest.raises(ClusterError) as caught:
        Api()
    assert told in caught.value.problem
    assert "kubectl get pods" in caught.value.cure
    assert "ひみつ" not in str(caught.value)


def test_a_folder_is_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with pytest.raises(ClusterError, match="there is no kubeconfig at"):
        Api()


def test_the_client_does_not_import_what_it_generates_and_leaves_it_importable(api: Api) -> None:
    import kubernetes.client

    assert kubernetes.client.CoreV1Api


def rayjob(run_url: str, state: str, job: str = "", **status: Any) -> Answer:
    made = {
        "metadata": {"name": "uta-abc-2", "annotations": {"utaforge/run": run_url}},
        "spec": {"backoffLimit": 2},
        "status": {"jobDeploymentStatus": state, "jobStatus": job, **status},
    }
    return 200, made


STATES = [
    ("", "", "pending"),
    ("Initializing", "", "pending"),
    ("Running", "PENDING", "running"),
    ("Retrying", "FAILED", "pending"),
    ("Complete", "SUCCEEDED", "succeeded"),
    ("Complete", "STOPPED", "failed"),
    ("Failed", "FAILED", "failed"),
    ("ValidationFailed", "", "failed"),
]


@pytest.mark.parametrize(("state", "job", "told"), STATES, ids=[f"{state} {job}" for state, job, _ in STATES])
def test_the_status_is_kuberays(server: Server, api: Api, state: str, job: str, told: str) -> None:
    server.answers[f"{RAYJOBS}/uta-abc-2"] = [rayjob("file:///歌", state, job, reason="AppFailed", message="壊れた")]
    status = KubernetesJobs("uta", api).status("uta-abc-2")
    assert status is not None
    assert (status.state, status.message) == (told, "AppFailed: 壊れた")


def test_following_gives_each_line_of_the_attempt_once_through_broken_connections(
    server: Server, api: Api, tmp_path: Path
) -> None:
    run = open_store(f"file://{tmp_path}/runs/uta")
    early = "attempt 1 begins\n前の試み\nattempt 2 begins\nstep 1/2\nste"
    run.put("logs/driver.log", early.encode())
    pods = "/api/v1/namespaces/uta/pods"
    waiting = {
        "metadata": {"name": "uta-head", "labels": {"ray.io/node-type": "head"}},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: 歌"}]},
    }
    server.answers[pods] = [(200, {"items": [waiting]})]
    running = rayjob(run.url, "Running", failed=1)
    path = f"{RAYJOBS}/uta-abc-2"
    server.answers[path] = [running, None, (503, {}), running, rayjob(run.url, "Complete", "SUCCEEDED")]
    lines: list[str] = []
    for line in KubernetesJobs("uta", api).follow("uta-abc-2"):
        lines.append(line)
        run.put("logs/driver.log", f"{early}p 2/2\n終わり\n".encode())
    assert [line for line in lines if "step" in line or line == "終わり"] == ["step 1/2", "step 2/2", "終わり"]
    assert "前の試み" not in lines
    assert "cluster 1 of at most 3 was lost; KubeRay makes the next one" in lines
    assert "head waits for a node: 0/1 nodes: 歌" in lines


def test_what_keeps_pods_from_coming_up_is_told_with_its_cure_while_following(
    server: Server, api: Api, tmp_path: Path
) -> None:
    message = 'FailedCreateHeadPod\npods "uta-head-" is forbidden: serviceaccount "uta-歌" not found'
    refused = {"type": "ReplicaFailure", "status": "True", "message": message}
    clusters = [{"metadata": {"name": "uta"}, "status": {"conditions": [refused]}}]
    server.answers["/apis/ray.io/v1/namespaces/uta/rayclusters"] = [(200, {"items": clusters})]
    server.answers[f"{RAYJOBS}/uta-abc-2"] = [rayjob(f"file://{tmp_path}/runs/uta", "Initializing")]
    line = next(iter(KubernetesJobs("uta", api).follow("uta-abc-2")))
    assert line.startswith("there is no service account uta-歌 in the namespace → make it")


def test_a_clock_of_ones_own_that_is_ahead_makes_no_run_hang(server: Server, kubeconfig: Path, tmp_path: Path) -> None:
    run = Run(open_store(f"file://{tmp_path}/runs/uta"))
    attempt = {"number": 2, "time": 0.0, "host": "箱", "user": "歌", "backend": "kubernetes", "address": server.url}
    named = {"submission": "uta-abc-2", "namespace": "uta", "context": "uta"}
    files = {
        "job.json": json.dumps({"train": {"steps": 9}}),
        "attempts/0002.json": json.dumps(attempt | named),
        "metrics.jsonl": json.dumps({"step": 3, "time": 0.0, "metrics": {"train/loss": 2.5}}),
        "logs/rank-0.log": "step 3/9 · loss 2.5 · 1.00 steps/s · 6s left\n",
    }
    for path, text in files.items():
        run.store.put(path, text.encode())
        os.utime(tmp_path / "runs" / "uta" / path, (time.time() - 360, time.time() - 360))
    server.answers[f"{RAYJOBS}/uta-abc-2"] = [rayjob(run.url, "Running", "RUNNING")]
    assert diagnose(gather(run))[0].what == "it hangs: nothing was heard of its ranks for 6 minutes"
    server.behind = 360.0
    assert diagnose(gather(run)) == []


def test_an_api_server_that_has_just_started_and_knows_no_rights_yet_is_asked_again(
    server: Server, api: Api, tmp_path: Path
) -> None:
    run, forbidden = f"file://{tmp_path}/runs/uta", (403, {"message": 'cannot get resource "rayjobs"'})
    server.answers[f"{RAYJOBS}/uta-abc-2"] = [
        rayjob(run, "Running", "RUNNING"),
        forbidden,
        rayjob(run, "Complete", "SUCCEEDED"),
    ]
    assert not any("refused" in line for line in KubernetesJobs("uta", api).follow("uta-abc-2"))
    assert len(server.answers[f"{RAYJOBS}/uta-abc-2"]) == 1


def test_following_ends_when_the_credentials_have_expired(
    server: Server, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.backends.kubernetes.REFUSED_SECONDS", 0.0)
    server.answers[f"{RAYJOBS}/uta-abc-2"] = [rayjob(f"file://{tmp_path}", "Running"), (401, {"message": "期限切れ"})]
    with pytest.raises(ClusterError, match=r"期限切れ\nuta-abc-2 goes on unseen") as caught:
        list(KubernetesJobs("uta", api).follow("uta-abc-2"))
    assert "your credentials have expired" in caught.value.cure
    assert len(server.asked) <= 4


def test_a_letter_of_several_bytes_that_arrives_in_two_parts_is_one_letter(
    server: Server, api: Api, tmp_path: Path
) -> None:
    run = open_store(f"file://{tmp_path}/runs/uta")
    text = "attempt 2 begins\n歌\n".encode()
    run.put("logs/driver.log", text[:-2])
    pods = "/api/v1/namespaces/uta/pods"
    server.answers[pods] = [(200, {"items": [{"metadata": {"name": "h", "labels": {}}, "status": {}}]})]
    path = f"{RAYJOBS}/uta-abc-2"
    server.answers[path] = [rayjob(run.url, "Running", failed=1), rayjob(run.url, "Complete", "SUCCEEDED")]
    lines: list[str] = []
    for line in KubernetesJobs("uta", api).follow("uta-abc-2"):
        lines.append(line)
        run.put("logs/driver.log", text)
    assert lines[-1] == "歌"


def test_submitting_twice_makes_one_rayjob_and_another_runs_name_is_refused(
    server: Server, api: Api, job: Jobs
) -> None:
    url = "s3://music/runs/uta"
    path = f"{RAYJOBS}/uta-abc-2"
    exists = (409, {"message": f'rayjobs.ray.io "{path}" already exists'})
    mine = (201, {"apiVersion": "ray.io/v1", "kind": "RayJob", **rayjob(url, "")[1]})
    mine[1]["metadata"]["uid"] = "一"
    server.answers |= {RAYJOBS: [mine, exists], path: [mine, rayjob("s3://他/runs/uta", "")]}
    for kind in (
        "policy/v1/namespaces/uta/poddisruptionbudgets",
        "networking.k8s.io/v1/namespaces/uta/networkpolicies",
    ):
        server.answers[f"/apis/{kind}"] = [(201, {}), (409, {"message": "already exists"})]
    on_pods = here(job())
    planned = plan(on_pods)
    jobs = KubernetesJobs("uta", api, lambda name, argv: manifests(on_pods, planned, Submission(name, argv[-1], argv)))
    jobs.submit("uta-abc-2", ["python", "-m", "trainer.driver", url])
    assert [body["metadata"].get("ownerReferences", [{}])[0].get("uid") for body in server.bodies] == [None, "一", "一"]
    jobs.submit("uta-abc-2", ["python", "-m", "trainer.driver", url])
    with pytest.raises(ClusterError, match="there is another RayJob uta-abc-2"):
        jobs.submit("uta-abc-2", ["python", "-m", "trainer.driver", url])


def here(job: Job, **cluster: Any) -> Job:
    """The job on an image in a registry that cannot be reached."""
    cluster = {"profile": "t4x4", "image": "127.0.0.1:1/utaforge:1", "namespace": "uta"} | cluster
    model = job.model.model_copy(update={"pretrained": "s3://models/歌"})
    places = {"store": "file:///tmp", "model": model, "cluster": Kubernetes(backend="kubernetes", **cluster)}
    return job.model_copy(update=places)


def found(api: Api, job: Job) -> list[str]:
    """What the checks say."""
    planned = plan(job)
    made = manifests(job, planned, Submission("uta-abc-1", "s3://music/runs/uta", ("python", "-m", "x")))
    errors: list[UtaforgeError] = list(checks(api, job, planned, made))
    assert all(error.cure for error in errors)
    return [error.problem for error in errors]


@pytest.fixture
def willing(server: Server) -> Server:
    """A cluster on which nothing stands in the way: one node with four T4s and a taint, and one for heads."""
    namespace = "/api/v1/namespaces/uta"
    resources = {"cpu": "48", "memory": "190Gi", "nvidia.com/gpu": "4"}
    node = {
        "metadata": {"labels": {"nvidia.com/gpu.product": "Tesla-T4"}},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
        "status": {"allocatable": resources},
    }
    plain = {"metadata": {}, "status": {"allocatable": {"cpu": "2", "memory": "8Gi"}}}
    server.answers |= {
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews": [(201, {"status": {"allowed": True}})],
        RAYJOBS: [(201, {})],
        f"{namespace}/serviceaccounts/utaforge-trainer": [(200, {"metadata": {}})],
        f"{namespace}/resourcequotas": [(200, {"items": []})],
        "/api/v1/nodes": [(200, {"items": [node, plain]})],
    }
    return server


def test_nothing_is_found_where_nothing_is_wrong(willing: Server, api: Api, job: Jobs) -> None:
    assert found(api, here(job())) == []


def test_everything_wrong_is_found_at_once(willing: Server, api: Api, job: Jobs) -> None:
    willing.answers["/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"] = [(201, {"status": {"allowed": False}})]
    quota = {"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.nvidia.com/gpu": "2", "pods": "10"}}}
    willing.answers["/api/v1/namespaces/uta/resourcequotas"] = [(200, {"items": [quota]})]
    wrong = here(
        job(), service_account="nobody", secrets=("none",), pull_secrets=("gone",), queue={"kind": "kueue", "name": "q"}
    )
    assert found(api, wrong) == [
        "you may not, in namespace uta: create rayjobs, get rayjobs, delete rayjobs, create poddisruptionbudgets, "
        "create networkpolicies, list pods",
        "cluster.service_account: there is no nobody in namespace uta",
        "cluster.secrets: there is no secret none in namespace uta",
        "cluster.pull_secrets: there is no secret gone in namespace uta",
        "the ResourceQuota gpus of namespace uta allows requests.nvidia.com/gpu 2, and this takes 4",
        "cluster.queue: this cluster has no kueue queue q",
    ]


def node(server: Server) -> dict[str, Any]:
    return server.answers["/api/v1/nodes"][0][1]["items"][0]  # type: ignore[index]


def test_a_head_that_no_node_takes_is_told(willing: Server, api: Api, job: Jobs) -> None:
    willing.answers["/api/v1/nodes"] = [(200, {"items": [node(willing)]})]
    first, second = found(api, here(job()))
    assert first.startswith("cluster.profile: for the head, which takes no GPU: all 1 nodes")
    assert second.startswith("cluster.profile: for the submitter, which takes no GPU: all 1 nodes")


def test_a_node_that_can_never_take_a_worker_is_told_by_its_reason(willing: Server, api: Api, job: Jobs) -> None:
    on_t4 = here(job())
    node(willing)["status"]["allocatable"]["nvidia.com/gpu"] = "2"
    assert "have room for 0 of 1 workers with cpu 44000m, memory 172032Mi, nvidia.com/gpu 4" in found(api, on_t4)[0]
    node(willing)["spec"]["taints"].append({"key": "歌", "effect": "NoExecute"})
    assert "all 1 nodes with the labels of profile t4x4 have taints" in found(api, on_t4)[0]
    node(willing)["metadata"]["labels"] = {}
    assert "none of 2 nodes has the labels that profile t4x4 looks for" in found(api, on_t4)[0]
    node(willing)["metadata"]["labels"] = {"cloud.google.com/gke-nodepool": "歌"}
    assert found(api, on_t4) == []


def test_keys_that_no_secret_has_are_named(
    willing: Server, api: Api, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    on_s3 = here(job(), secrets=("store",)).model_copy(update={"store": "s3://music"})
    willing.answers[SECRET] = [secret(AWS_ACCESS_KEY_ID="歌")]
    assert found(api, on_s3) == ["cluster.secrets: the secrets store lack AWS_ENDPOINT_URL, AWS_SECRET_ACCESS_KEY"]


SECRET = "/api/v1/namespaces/uta/secrets/store"


def secret(**keys: str) -> Answer:
    return 200, {"data": {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}}


def forbidden(verb: str, resource: str) -> Answer:
    message = f'{resource} is forbidden: User "歌" cannot {verb} resource "{resource}" in API group "" in the namespace'
    return 403, {"message": message}


def test_what_may_not_be_looked_at_is_said_once_and_is_no_error(
    willing: Server, api: Api, job: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    willing.answers[SECRET] = [forbidden("get", "secrets")]
    willing.answers["/api/v1/nodes"] = [forbidden("list", "nodes")]
    assert found(api, here(job(), secrets=("store",), pull_secrets=("store",))) == []
    assert caplog.messages == ["not checked, since you may not: get secrets, list nodes"]


REFUSED_OBJECTS = [
    'admission webhook "歌.example" denied the request: no images from there',
    'rayjobs.ray.io "uta-1" is forbidden: exceeded quota: uta, requested: count/rayjobs.ray.io=1, used: 50',
]


@pytest.mark.parametrize("message", REFUSED_OBJECTS, ids=["webhook", "quota"])
def test_a_rayjob_that_the_server_does_not_admit_is_told(willing: Server, api: Api, job: Jobs, message: str) -> None:
    willing.answers[RAYJOBS] = [(403, {"message": message})]
    (told,) = found(api, here(job()))
    assert message in told


def test_the_store_is_tried_with_the_keys_of_the_pods(
    willing: Server, api: Api, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of this machine")
    keys = {"AWS_ACCESS_KEY_ID": "uta", "AWS_SECRET_ACCESS_KEY": "ひみつの歌"}
    on_s3 = here(job(), secrets=("store",)).model_copy(update={"store": "s3://music/歌"})
    willing.answers[SECRET] = [secret(**keys, AWS_ENDPOINT_URL=willing.url)]
    wrong = "<Error><Code>InvalidAccessKeyId</Code></Error>"
    willing.otherwise = (403, wrong)
    (told,) = found(api, on_s3)
    assert re.match("cluster.secrets: with the keys of the pods: cannot write s3://music/歌/.*InvalidAccessKeyId", told)
    assert "ひみつの歌" not in told
    willing.otherwise = (200, "")
    assert found(api, on_s3) == []
    assert not any("x-amz-security-token" in each for each in willing.headers)
    willing.answers[SECRET] = [secret(**keys, AWS_ENDPOINT_URL="http://127.0.0.1:1")]
    assert found(api, on_s3) == []


@pytest.mark.parametrize(
    ("quantity", "number"), [("500m", 0.5), ("2", 2), ("1Gi", 1 << 30), ("1e3", 1000), ("3k", 3000), ("5Mi", 5 << 20)]
)
def test_quantities_are_kubernetes(quantity: str, number: float) -> None:
    assert float(amount(quantity)) == number


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("ghcr.io/you/uta:1.0", ("ghcr.io", "you/uta", "1.0")),
        ("10.0.0.1:5000/uta", ("10.0.0.1:5000", "uta", "latest")),
        ("python:3.11", ("registry-1.docker.io", "library/python", "3.11")),
        ("you/uta@sha256:" + "a" * 64, ("registry-1.docker.io", "you/uta", "sha256:" + "a" * 64)),
        ("localhost/uta:1", ("localhost", "uta", "1")),
    ],
)
def test_an_images_name_is_taken_apart_as_docker_does(image: str, parts: tuple[str, str, str]) -> None:
    told = registry.reference(image)
    assert (told.host, told.path, told.version) == parts


def test_a_registry_is_asked_as_a_node_would_with_the_login_of_the_pull_secret(server: Server) -> None:
    host = server.url.removeprefix("http://")
    login = base64.b64encode("歌:ひみつ".encode()).decode()
    config = json.dumps({"auths": {f"https://{host}/v2/": {"auth": login}}}).encode()
    logins = registry.logins_of([{"data": {".dockerconfigjson": base64.b64encode(config).decode()}}])
    assert logins == {host: login}
    manifest = "/v2/uta/manifests/1"
    server.answers |= {manifest: [(401, {}), (200, {})], "/token": [(200, {"token": "t"})]}
    assert registry.look(f"{host}/uta:1", logins) == "there"
    server.answers |= {manifest: [(401, {}), (404, {})]}
    assert registry.look(f"{host}/uta:1", logins) == "missing"
    server.answers |= {manifest: [(401, {})]}
    assert registry.look(f"{host}/uta:1") == "denied"
    assert registry.look("127.0.0.1:1/uta:1") == "unknown"

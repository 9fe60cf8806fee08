"""What would be sent to Kubernetes, compared with what is meant, with KubeRay's schema and with its unwritten rules."""

import copy
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher.plan import plan
from launcher.profiles import find_profile
from launcher.render.rayjob import RAY_VERSION, Submission, manifests, object_name, requests_of
from launcher.render.rules import broken_rules
from trainer.spec import Job, JobError
from trainer.spec.cluster import Budget, Kubernetes

SCHEMA = Path(__file__).parents[4] / "shared" / "data" / "kuberay" / "rayjob-v1.schema.json"
URL = "s3://music/runs/uta"
SUBMISSION = Submission(object_name(URL, 1), URL, ("python", "-m", "trainer.driver", URL))
Jobs = Callable[..., Job]


def on(job: Job, **cluster: Any) -> Job:
    cluster = {"profile": "t4x4", "image": "10.0.0.1:5000/utaforge:1"} | cluster
    return job.model_copy(update={"cluster": Kubernetes(backend="kubernetes", **cluster)})


def rendered(job: Job, submission: Submission = SUBMISSION) -> list[dict[str, Any]]:
    return manifests(job, plan(job), submission)


def workers(job: Job) -> dict[str, Any]:
    return rendered(job)[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def variables(template: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in template["spec"]["containers"][0]["env"]}


def test_the_rayjob_says_how_it_starts_ends_and_is_tried_again(job: Jobs) -> None:
    made, budget, policy = rendered(on(job(), attempts=2))
    spec = {name: value for name, value in made["spec"].items() if not name.endswith(("Template", "ClusterSpec"))}
    assert spec == {
        "submissionMode": "K8sJobMode",
        "entrypoint": "python -m trainer.driver s3://music/runs/uta",
        "backoffLimit": 1,
        "submitterConfig": {"backoffLimit": 2},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "preRunningDeadlineSeconds": 1200,
    }
    assert made["metadata"] == {
        "name": SUBMISSION.name,
        "namespace": "utaforge",
        "labels": {
            "app.kubernetes.io/name": "utaforge",
            "utaforge/run": "uta",
            "utaforge/submission": SUBMISSION.name,
            "utaforge/job": "demo",
        },
        "annotations": {"utaforge/run": URL, "ray.io/disable-provisioned-head-restart": "true"},
    }
    assert [each["kind"] for each in (made, budget, policy)] == ["RayJob", "PodDisruptionBudget", "NetworkPolicy"]
    assert budget["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert policy["spec"]["podSelector"]["matchLabels"] == {"utaforge/submission": SUBMISSION.name}


def test_four_t4s_are_one_pod_on_a_node_of_any_kind_of_cluster(job: Jobs) -> None:
    group = workers(on(job()))
    assert [group[name] for name in ("groupName", "replicas", "minReplicas", "maxReplicas")] == ["t4x4", 1, 1, 1]
    assert group["labels"] == {"ray.io/market-type": "on-demand", "ray.io/accelerator-type": "T4"}
    spec = group["template"]["spec"]
    assert spec["containers"][0]["resources"] == {
        "requests": {"cpu": "44000m", "memory": "172032Mi", "nvidia.com/gpu": "4"},
        "limits": {"memory": "172032Mi", "nvidia.com/gpu": "4"},
    }
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert [volume["emptyDir"] for volume in spec["volumes"]] == [
        {"sizeLimit": "400Gi"},
        {"medium": "Memory", "sizeLimit": "16384Mi"},
    ]
    assert variables(group["template"])["OMP_NUM_THREADS"] == "11"
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [[(each["key"], each["operator"]) for each in term["matchExpressions"]] for term in terms] == [
        [("cloud.google.com/gke-accelerator", "In"), ("cloud.google.com/gke-spot", "NotIn")],
        [
            ("karpenter.k8s.aws/instance-gpu-name", "In"),
            ("karpenter.k8s.aws/instance-gpu-count", "In"),
            ("karpenter.sh/capacity-type", "NotIn"),
        ],
        [("nvidia.com/gpu.product", "In")],
    ]


def test_spot_takes_only_nodes_that_are_spot_and_keeps_the_head_off_them(job: Jobs) -> None:
    spot = on(job(), spot=True)
    group = workers(spot)
    spec = group["template"]["spec"]
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [term["matchExpressions"][-1] for term in terms] == [
        {"key": "cloud.google.com/gke-spot", "operator": "In", "values": ["true"]},
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]},
    ]
    assert {each["key"] for each in spec["tolerations"]} >= {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert spec["terminationGracePeriodSeconds"] > int(
        variables(group["template"])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    )
    head = rendered(spot)[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (term,) = head["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {each["operator"] for each in term["matchExpressions"]} == {"NotIn"}
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    assert "tolerations" not in head["spec"]
    with pytest.raises(JobError, match="profile rtx4090 names no spot nodes"):
        rendered(on(job(), profile="rtx4090", spot=True))


def test_two_gpus_of_a_machine_of_four_get_half_of_it_and_eight_get_two_machines(job: Jobs) -> None:
    half = workers(on(job(), workers=2))["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert half == {"cpu": "22000m", "memory": "86016Mi", "nvidia.com/gpu": "2"}
    assert workers(on(job(), workers=8))["replicas"] == 2


def test_without_gpus_every_worker_is_a_pod_with_one_rank(job: Jobs) -> None:
    group = workers(on(job(), profile="cpu", workers=2))
    assert (group["replicas"], group["rayStartParams"]["num-cpus"]) == (2, "1")
    assert "affinity" not in group["template"]["spec"]


def test_every_pod_is_locked_down_and_gets_secrets_by_name_only(job: Jobs) -> None:
    made = rendered(on(job(), secrets=("utaforge-store",), pull_secrets=("registry",), service_account="sa"))
    templates = [template for _, template in requests_of(made[0])]
    assert len(templates) == 3
    for template in templates:
        spec = template["spec"]
        assert spec["serviceAccountName"] == "sa"
        assert spec["automountServiceAccountToken"] is False
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "utaforge-store"}}]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/dev/shm"}
        assert variables(template)["RAY_AUTH_MODE"] == "token"


def test_a_queue_is_named_by_its_label_and_kueue_lets_the_job_go(job: Jobs) -> None:
    kueue = rendered(on(job(), queue={"kind": "kueue", "name": "music"}))[0]
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "music"
    assert kueue["spec"]["suspend"] is True
    volcano = rendered(on(job(), queue={"kind": "volcano", "name": "music"}))[0]
    assert volcano["metadata"]["labels"]["volcano.sh/queue-name"] == "music"
    assert "suspend" not in volcano["spec"]


def test_code_of_ones_own_comes_before_the_images(job: Jobs) -> None:
    overlaid = Submission(SUBMISSION.name, URL, SUBMISSION.argv, "s3://music/code/abc.zip")
    assert rendered(on(job()), overlaid)[0]["spec"]["runtimeEnvYAML"] == "py_modules: [s3://music/code/abc.zip]\n"


def test_without_an_image_the_cure_is_make_image(job: Jobs) -> None:
    with pytest.raises(JobError, match="make image"):
        rendered(on(job(), image=None))


def test_kuberay_ends_what_is_still_there_after_the_budgets_hours_and_the_start_of_pods(job: Jobs) -> None:
    made, *_ = rendered(on(job().model_copy(update={"budget": Budget(hours=1.5)})))
    assert made["spec"]["activeDeadlineSeconds"] == 5400 + 1200


def test_no_pod_of_ray_fetches_or_reports_anything_behind_its_back(job: Jobs) -> None:
    cluster = rendered(on(job()))[0]["spec"]["rayClusterSpec"]
    shut = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert variables(group["template"]).items() >= shut.items()


@pytest.mark.parametrize("run", ["uta", "1-uta", "a" * 63, "songbloom-ja-" + "x" * 40 + "-12"])
def test_names_fit_kuberay_and_differ_by_store_and_attempt(run: str) -> None:
    names = {object_name(f"s3://{store}/runs/{run}", attempt) for store in ("音楽", "other") for attempt in (1, 12)}
    assert len(names) == 4
    for name in names:
        assert list(broken_rules(changed({"metadata.name": name}))) == []


@pytest.mark.parametrize("profile", ["cpu", "t4x4", "a100", "a100-40", "rtx4090"])
@pytest.mark.skipif(not SCHEMA.exists(), reason=f"KubeRay's schema is not there ({SCHEMA})")
def test_every_profile_gives_a_rayjob_that_kuberays_schema_and_rules_accept(job: Jobs, profile: str) -> None:
    import jsonschema

    made = rendered(on(job(), profile=profile, workers=4, queue={"kind": "kueue", "name": "q"}))[0]
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(made)
    assert list(broken_rules(made)) == []


def test_the_ray_of_the_image_is_the_one_that_is_told() -> None:
    assert metadata.version("ray") == RAY_VERSION


def test_pods_of_ray_are_ready_once_its_agent_answers(job: Jobs) -> None:
    cluster = rendered(on(job()))[0]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        probe = group["template"]["spec"]["containers"][0]["readinessProbe"]
        assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert "initialDelaySeconds" not in probe


def test_the_machine_of_the_plan_is_used_whatever_the_profile_says_later(job: Jobs) -> None:
    planned = plan(on(job()))
    assert planned.machine == find_profile("t4x4")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """A RayJob that breaks no rule, but for the changes: dotted path → value."""
    template = {"spec": {"containers": [{"name": "ray"}]}}
    group = {"groupName": "t4", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "template": template}
    made: dict[str, Any] = {
        "metadata": {"name": "uta-1"},
        "spec": {
            "entrypoint": "python -m trainer.driver s3://music/runs/uta",
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": template},
                "workerGroupSpecs": [group],
            },
        },
    }
    made = copy.deepcopy(made)
    for path, value in changes.items():
        *way, last = path.split(".")
        place: Any = made
        for key in way:
            place = place[int(key)] if key.isdecimal() else place.setdefault(key, {})
        place[last] = value
    return made


WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"
BROKEN = [
    ({"metadata.name": "a" * 48}, "more than 47 characters"),
    ({"metadata.name": "1-uta"}, "no DNS-1035 label"),
    ({"spec.entrypoint": "echo 歌 && hostname"}, "one command without shell syntax"),
    ({"spec.entrypoint": "python `whoami`"}, "one command without shell syntax"),
    ({"spec.ttlSecondsAfterFinished": 9, "spec.shutdownAfterJobFinishes": False}, "needs shutdownAfterJobFinishes"),
    ({"spec.suspend": True, "spec.shutdownAfterJobFinishes": False}, "needs shutdownAfterJobFinishes"),
    ({"spec.deletionStrategy": {"deletionRules": [{}]}}, "exclude each other"),
    ({"spec.activeDeadlineSeconds": 0}, "more than 0"),
    ({"spec.backoffLimit": -1}, "0 or more"),
    ({"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}}, "no submitter"),
    ({"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 1}, "does not try again"),
    ({"spec.rayClusterSpec.authOptions": {"mode": "token"}, "spec.rayClusterSpec.rayVersion": "2.51.1"}, "2.52"),
    ({f"{WORKER}.rayStartParams": {"num-gpus": 0}}, "has to be text, not 0"),
    ({f"{WORKER}.rayStartParams": {"labels": "a=b"}}, "belongs into the group's labels"),
    ({f"{WORKER}.resources": {"GPU": "1"}, f"{WORKER}.rayStartParams": {"num-gpus": "1"}}, "exclude num-gpus"),
    ({f"{WORKER}.labels": {"ray.io/accelerator-type": "四"}}, "cannot be the value of a label"),
    ({f"{WORKER}.minReplicas": None}, "needs minReplicas and maxReplicas"),
    ({f"{WORKER}.minReplicas": 2}, "is no range"),
]


@pytest.mark.parametrize(("changes", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_what_kuberay_would_only_refuse_later_is_refused_before(changes: dict[str, Any], said: str) -> None:
    assert list(broken_rules(changed({}))) == []
    (rule,) = broken_rules(changed(changes))
    assert said in rule

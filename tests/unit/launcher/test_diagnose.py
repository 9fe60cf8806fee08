"""Snapshots of real runs on a real cluster (``tests/kubernetes/record.py``), and of runs on this machine."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Attempt, Run, Status
from launcher.snapshot import Log, Snapshot, gather
from launcher.why import QUIET_SECONDS, Cause, diagnose
from trainer.data.shards import Shard
from trainer.spec.errors import DataError, StoreError
from trainer.store import open_store

SNAPSHOTS = Path(__file__).with_name("snapshots")


def snapshot(name: str) -> Snapshot:
    return Snapshot.of_json(json.loads((SNAPSHOTS / f"{name}.json").read_text(encoding="utf-8")))


def first(name: str) -> Cause:
    return diagnose(snapshot(name))[0]


@pytest.mark.parametrize(
    ("name", "what", "evidence", "cure"),
    [
        ("gone", "there is no image registry.example/utaforge-trainer:gone", "not found", "make image PUSH=1"),
        ("no-secret", "there is no secret uta-no in the namespace", "CreateContainerConfigError", "cluster.secrets"),
        (
            "no-account",
            "there is no service account uta-nobody in the namespace",
            'serviceaccount "uta-nobody" not found',
            "cluster.service_account",
        ),
        (
            "quota",
            "the namespace's ResourceQuota uta-small leaves no room for the run's pods",
            "limited: requests.memory=3Gi",
            "fewer cluster.workers",
        ),
        (
            "no-gpu",
            "no node has the labels that the worker's profile looks for: no such machine, or other labels",
            "didn't match Pod's node affinity",
            "profiles/NAME.yaml",
        ),
        (
            "taint",
            "the nodes for the worker have taints that it does not tolerate nvidia.com/gpu=present",
            "untolerated taints {nvidia.com/gpu=present}",
            "tolerations",
        ),
        ("nan", "step 2: the loss is nan; the weights are those of step 1", "driver.log: ", "lower train.optimizer.lr"),
        ("store-denied", "the store refuses the run", "SignatureDoesNotMatch", "cluster.secrets"),
        (
            "closed",
            "the registry does not give private.example/utaforge-trainer:dev2 to the cluster",
            "401 Unauthorized",
            "cluster.pull_secrets",
        ),
        (
            "raised",
            "the code raised an error: ValueError: 音が出ない",
            "trainer/loop.py",
            "correct it",
        ),
        ("preempted", "a worker was taken away", "-worker-", "go on from the last checkpoint"),
    ],
)
def test_the_likeliest_cause_names_what_happened_shows_it_and_says_what_to_do(
    name: str, what: str, evidence: str, cure: str
) -> None:
    cause = first(name)
    assert cause.what == what
    assert evidence in cause.evidence
    assert cure in cause.cure


def test_a_head_that_is_gone_is_told_beside_what_keeps_the_next_one() -> None:
    assert [cause.what for cause in diagnose(snapshot("head-lost"))] == [
        "no node has enough free memory for the worker",
        "1 of 3 clusters were lost: the head was gone, or pods did not come up in time",
    ]


def test_what_a_queue_holds_back_is_said_to_wait_there() -> None:
    held = _with_rayjob("gone", {"jobDeploymentStatus": "Suspended"}, suspend=True)
    assert held.objects and held.objects.rayjob
    held.objects.rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "歌-queue"
    held.objects.pods.clear()
    assert diagnose(held)[0].what == "it waits in the queue 歌-queue"


def test_a_deadline_is_told_by_what_kept_the_pods_where_they_never_came_up() -> None:
    assert [cause.what for cause in diagnose(snapshot("late"))][:2] == [
        "there is no image registry.example/utaforge-trainer:gone",
        "its pods did not come up in time",
    ]


def test_a_budget_that_is_used_up_is_told_as_such() -> None:
    """KubeRay counts the cluster that it ended as failed, too."""
    for failed, others in (
        (1, []),
        (2, ["1 of 3 clusters were lost: the head was gone, or pods did not come up in time"]),
    ):
        told = {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "failed": failed}
        late = _with_rayjob("gone", told)
        assert late.objects
        late.objects.pods.clear()
        assert [cause.what for cause in diagnose(late)] == ["the budget's hours are over", *others]


@pytest.mark.parametrize(
    ("terminated", "what"),
    [
        ({"reason": "OOMKilled", "exitCode": 137}, "the worker ran out of memory"),
        ({"reason": "Error", "exitCode": 135}, "the worker ran out of shared memory (/dev/shm)"),
        ({"reason": "Error", "exitCode": 137}, "the worker was killed"),
    ],
)
def test_how_a_container_ended_tells_what_it_lacked(terminated: dict[str, Any], what: str) -> None:
    seen = snapshot("preempted")
    assert seen.objects
    ended = {"name": "ray-worker", "image": "", "state": {}, "lastState": {"terminated": terminated}}
    labels = {"ray.io/node-type": "worker"}
    seen.objects.pods[:] = [
        {"metadata": {"name": "歌", "labels": labels}, "spec": {}, "status": {"containerStatuses": [ended]}}
    ]
    assert diagnose(seen)[0].what == what


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the GPU ran out of memory"),
        ("Task was killed due to the node running low on memory.", "a pod ran out of memory"),
        ("a rank was lost: its machine or pod ran out of memory", "a pod ran out of memory"),
        ("this pod ran out of memory: the kernel has killed 1 of its processes so far", "a pod ran out of memory"),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried "
            "to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
            "a pod ran out of memory",
        ),
        ("RuntimeError: CUDA error: out of memory", "the GPU ran out of memory"),
        ("NCCL WARN Cuda failure 2 'out of memory'", "the GPU ran out of memory"),
        *(
            (text, "a pod ran out of shared memory (/dev/shm)")
            for text in (
                "RuntimeError: unable to write to file </torch_1_2>: No space left on device (28)",
                "RuntimeError: unable to mmap 4096 bytes from file </torch_1_2>: Cannot allocate memory (12)",
                "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)",
                "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory. Please try to raise your shared memory limit.",
                "fallocate: Failed to extend /dev/shm/nccl-歌 to 9637892 bytes, error: No space left on device (28)",
            )
        ),
        ("OSError: [Errno 28] No space left on device: '/tmp/歌.flac'", "the disk ran full"),
        (
            "cannot read s3://歌/job.json: the clocks differ too much (RequestTimeTooSkewed)",
            "a clock is wrong: the store refuses what comes from where the run is",
        ),
        (
            "cannot write s3://歌/runs/uta: the server cannot be reached (http://127.0.0.1:9000)",
            "the store cannot be reached from where the run is",
        ),
    ],
)
def test_what_a_program_said_last_tells_what_it_lacked(line: str, what: str) -> None:
    cause = diagnose(_local("failed", ["step 1/40 · loss 2.5", line]))[0]
    assert (cause.what, cause.evidence) == (what, f"driver.log: {line}")


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 9Mi. ",
            "a pod ran out of memory",
        ),
        (
            'Usage of EmptyDir volume "shared-memory" exceeds the limit "256Mi". ',
            "a pod ran out of shared memory (/dev/shm)",
        ),
        ('Usage of EmptyDir volume "scratch" exceeds the limit "4Gi". ', "the disk ran full"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 4Gi. ", "the disk ran full"),
        ('Container ray-worker exceeded its local ephemeral storage limit "4Gi". ', "the disk ran full"),
    ],
)
def test_what_the_kubelet_says_of_a_pod_that_it_evicts_tells_what_it_lacked(message: str, what: str) -> None:
    """Its words: ``pkg/kubelet/eviction/helpers.go`` of Kubernetes 1.34.4."""
    seen = snapshot("preempted")
    assert seen.objects
    labels = {"ray.io/node-type": "worker"}
    evicted = {"phase": "Failed", "reason": "Evicted", "message": message}
    seen.objects.pods[:] = [{"metadata": {"name": "歌", "labels": labels}, "spec": {}, "status": evicted}]
    assert diagnose(seen)[0].what == what


def test_gpus_that_others_use_are_told_before_nodes_of_another_kind() -> None:
    """The scheduler's words: ``NodeResourcesFit`` and ``NodeAffinity`` of Kubernetes 1.34.4."""
    seen = snapshot("no-gpu")
    assert seen.objects
    seen.objects.nodes.clear()
    seen.objects.pods[:] = [
        pod for pod in seen.objects.pods if pod["metadata"]["labels"]["ray.io/node-type"] == "worker"
    ]
    for pod in seen.objects.pods:
        for condition in pod["status"]["conditions"]:
            condition["message"] = (
                "0/3 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, "
                "2 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No preemption victims found."
            )
    cause = diagnose(seen)[0]
    assert cause.what == "no node has enough free GPUs for the worker"
    assert "2 Insufficient nvidia.com/gpu" in cause.evidence
    assert "cluster.workers" in cause.cure


def test_a_name_that_no_image_can_have_is_told() -> None:
    """The kubelet's words: ``pkg/util/parsers/parsers.go`` of Kubernetes 1.34.4."""
    seen = snapshot("gone")
    assert seen.objects
    message = (
        'Failed to apply default image tag "歌/Uta": couldn\'t parse image name "歌/Uta": invalid reference format'
    )
    status = {"containerStatuses": [_waiting("歌/Uta", "InvalidImageName", message)]}
    seen.objects.pods[:] = [{"metadata": {"name": "uta", "labels": {}}, "spec": {}, "status": status}]
    cause = diagnose(seen)[0]
    assert (cause.what, cause.evidence) == ("歌/Uta is no image's name", message)
    assert "cluster.image" in cause.cure


@pytest.mark.parametrize("state", ["Retrying", "Running", "Failed"])
def test_a_head_that_is_gone_is_the_first_cause_where_nothing_keeps_the_next_one(state: str) -> None:
    lost = _with_rayjob("head-lost", {"jobDeploymentStatus": state, "failed": 1})
    assert lost.objects
    lost.objects.pods.clear()
    lost.objects.events.clear()
    cause = diagnose(replace(lost, logs={}))[0]
    assert cause.what == "1 of 3 clusters were lost: the head was gone, or pods did not come up in time"
    assert ("submitting the job again" if state == "Failed" else "KubeRay makes the next one") in cause.cure


def test_a_damaged_shard_is_told_as_the_store_and_the_reader_tell_it(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    store.publish({"shards/歌.parquet": b"whole"})
    store.put("shards/歌.parquet", b"torn")
    with pytest.raises(StoreError) as damaged:
        store.fetch(tmp_path / "out")
    (tmp_path / "破.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError) as unreadable:
        Shard(tmp_path / "破.parquet")
    for error in (damaged.value, unreadable.value):
        told = {"problem": error.problem, "cure": error.cure, "exit_code": error.exit_code}
        cause = diagnose(replace(_local("failed", [error.problem]), failure=told))[0]
        assert (cause.what, cause.evidence, cause.cure) == (error.problem, f"driver.log: {error.problem}", error.cure)
        assert "parquet" in cause.what and "damaged" in cause.what


def test_keys_that_the_store_refuses_are_told_though_the_driver_was_stopped_for_good() -> None:
    stopped = {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "Job was intentionally stopped."}
    cause = diagnose(_with_rayjob("store-denied", stopped))[0]
    assert cause.what == "the store refuses the run"
    assert "SignatureDoesNotMatch" in cause.evidence and "cluster.secrets" in cause.cure


def test_code_that_breaks_what_would_tell_it_is_read_from_the_submitter() -> None:
    seen = _with_rayjob("store-denied", {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"})
    assert seen.objects
    told = "the trainer met an error of its own: SyntaxError: '(' was never closed (store.py, line 1)"
    last = ['  File "/code/trainer/store.py", line 1', "    歌 = (", "SyntaxError: '(' was never closed"]
    seen.objects.submitter[:] = [*last, "SyntaxError: '(' was never closed (store.py, line 1)", told]
    cause = diagnose(seen)[0]
    assert cause.what == "the code raised an error: SyntaxError: '(' was never closed (store.py, line 1)"
    assert cause.evidence == 'submitter: File "/code/trainer/store.py", line 1'


def test_a_rayjob_that_kuberay_does_not_see_is_told_by_the_servers_clock() -> None:
    seen = _with_rayjob("gone", {})
    assert seen.objects and seen.objects.rayjob
    seen.objects.pods.clear()
    seen.objects.clusters.clear()
    seen.objects.events.clear()
    seen.objects.rayjob["metadata"]["creationTimestamp"] = "2026-11-21T16:51:13Z"
    made = datetime(2026, 11, 21, 16, 51, 13, tzinfo=UTC).timestamp()
    unseen = "KubeRay has not looked at the RayJob yet"
    assert [unseen in {cause.what for cause in diagnose(replace(seen, now=made + age))} for age in (29, 31)] == [
        False,
        True,
    ]


def test_an_error_of_the_code_is_shown_with_the_line_that_raised_it() -> None:
    told = _local("failed", ['  File "trainer/loop.py", line 41, in train', "ValueError: 音が出ない"])
    problem = "the trainer met an error of its own: ValueError: 音が出ない"
    cause = diagnose(replace(told, failure={"problem": problem, "cure": "", "exit_code": 6}))[0]
    assert cause.what == "the code raised an error: ValueError: 音が出ない"
    assert cause.evidence == 'driver.log: File "trainer/loop.py", line 41, in train'


def test_a_run_that_says_nothing_for_long_is_said_to_hang() -> None:
    fine = _local("running", ["step 3/40 · loss 2.1 · 0.50 steps/s · 1m 14s left"])
    assert diagnose(fine) == []
    cause = diagnose(replace(fine, now=fine.now + 2 * QUIET_SECONDS))[0]
    assert cause.what == "it hangs: nothing was heard of its ranks for 10 minutes"
    assert "step 3/40" in cause.evidence


def test_a_rank_that_was_frozen_hangs_whatever_ray_goes_on_saying() -> None:
    cause = first("hung")
    assert cause.what == "it hangs: nothing was heard of its ranks for 6 minutes"
    assert cause.evidence.startswith("rank-0.log, 6 minutes ago: ")


def test_slow_steps_are_no_hang() -> None:
    slow = _local("running", ["step 3/40 · loss 2.1 · 0.01 steps/s · 61m 40s left"])
    assert diagnose(replace(slow, now=slow.now + 2 * QUIET_SECONDS)) == []


def test_without_any_sign_it_says_so_and_shows_what_was_last_heard() -> None:
    cause = diagnose(_local("stopped", ["子守唄を準備しています"]))[0]
    assert cause.what == "no cause is known: its program ended without a word"
    assert cause.evidence == "driver.log: 子守唄を準備しています"


def test_a_machine_that_was_taken_away_with_notice_is_named_after_its_pod_is_gone() -> None:
    told = "a machine is being taken away: stopped at step 7 with a checkpoint; going on when there is another"
    (cause,) = diagnose(_local("stopped", [told, "窓が閉じました"]))
    assert cause.what == "a machine was taken away"
    assert cause.evidence == f"driver.log: {told}"


def test_a_finished_run_has_no_cause() -> None:
    assert diagnose(_local("finished", ["完了"])) == []


def test_a_rank_killed_for_memory_is_told_of_after_all_that_ray_says_and_while_ranks_train_on(tmp_path: Path) -> None:
    run = Run(open_store(f"file://{tmp_path}/runs/歌"))
    ray = ["(TrainController pid=504)   actor=Actor(RayTrainWorker, c4fc82bb8b47104479a62e8102000000),"] * 255
    steps = [f"step {step}/99 · loss 2.5 · 1.00 steps/s · 1m 30s left" for step in range(1, 61)]
    log = ["a rank was lost: its machine or pod ran out of memory", *ray, *steps]
    run.store.put("job.json", json.dumps({"train": {"steps": 99}}).encode())
    run.store.put("logs/driver.log", "\n".join(log).encode())
    assert "a pod ran out of memory" in [cause.what for cause in diagnose(gather(run))]


def _local(state: Any, lines: list[str]) -> Snapshot:
    now = time.time()
    status = Status("歌", "file:///store/runs/uta", state, 3, 40, 2.1, 1, "local", None, None, None)
    attempt = Attempt(1, now - 60, "ホスト", "歌", "local", "http://127.0.0.1:1", "uta-1")
    return Snapshot(
        now,
        status,
        attempt,
        None,
        {"driver.log": Log(now, lines), "rank-0.log": Log(now - 1, ["先の行", *lines])},
        now,
        None,
    )


def _waiting(image: str, reason: str, message: str) -> dict[str, Any]:
    return {"name": "ray", "image": image, "state": {"waiting": {"reason": reason, "message": message}}}


def _with_rayjob(name: str, status: dict[str, Any], *, suspend: bool = False) -> Snapshot:
    seen = snapshot(name)
    assert seen.objects and seen.objects.rayjob
    seen.objects.rayjob["status"] = status
    seen.objects.rayjob["spec"]["suspend"] = suspend
    return replace(seen, status=replace(seen.status, state="stopped"))

"""Snapshots of real runs on a real cluster (``tests/kubernetes/record.py``), and of runs on this machine."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Attempt, Status
from launcher.snapshot import Log, Snapshot
from launcher.why import QUIET_SECONDS, Cause, diagnose

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
    late = _with_rayjob("gone", {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"})
    assert late.objects
    late.objects.pods.clear()
    assert diagnose(late)[0].what == "the budget's hours are over"


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
        (
            "RuntimeError: unable to write to file </torch_歌>: /dev/shm is full",
            "a pod ran out of shared memory (/dev/shm)",
        ),
        ("OSError: [Errno 28] No space left on device: '/tmp/歌.flac'", "the disk ran full"),
    ],
)
def test_what_a_program_said_last_tells_what_it_lacked(line: str, what: str) -> None:
    cause = diagnose(_local("failed", ["step 1/40 · loss 2.5", line]))[0]
    assert (cause.what, cause.evidence) == (what, f"driver.log: {line}")


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


def _with_rayjob(name: str, status: dict[str, Any], *, suspend: bool = False) -> Snapshot:
    seen = snapshot(name)
    assert seen.objects and seen.objects.rayjob
    seen.objects.rayjob["status"] = status
    seen.objects.rayjob["spec"]["suspend"] = suspend
    return replace(seen, status=replace(seen.status, state="stopped"))

"""What people are told of a rank that was lost, from what Ray says and what the kernel counts."""

from pathlib import Path

import pytest

from trainer.driver.attempt import why_lost
from trainer.rundir import FAILURE, RunDirectory
from trainer.worker import _telling_failures, killed_for_memory  # pyright: ignore[reportPrivateUsage]

MEMORY = """Training failed due to controller error:
1 worker(s) were killed due to the node running low on memory. Top 10 memory users: 歌
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io"""
OURS = """Training failed due to worker errors:
StoreError: cannot write s3://歌/runs/uta: the server cannot be reached
  → check AWS_ENDPOINT_URL and the network, and that the server runs"""


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (MEMORY, "its machine or pod ran out of memory"),
        (OURS, "StoreError: cannot write s3://歌/runs/uta: the server cannot be reached"),
        (
            "Error:\n\tthe actor's node was terminated: no heartbeats. Advice follows.",
            "the actor's node was terminated: no heartbeats",
        ),
        ("TrainingFailedError", "TrainingFailedError"),
    ],
)
def test_the_reason_is_one_short_line_and_no_advice(told: str, reason: str) -> None:
    assert why_lost(told) == reason


@pytest.mark.parametrize(
    ("counts", "killed"),
    [
        ("low 0\nhigh 0\nmax 61\noom 3\noom_kill 2\noom_group_kill 1\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", 1),
        ("oom_kill_disable 0\nunder_oom 0\n", 0),
        (None, 0),
    ],
)
def test_what_the_kernel_has_killed_for_memory_is_read_by_either_version_of_control_groups(
    tmp_path: Path, counts: str | None, killed: int
) -> None:
    path = tmp_path / "歌"
    if counts:
        path.write_text(counts)
    assert killed_for_memory([tmp_path / "gone", path]) == killed


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (ValueError("Default process group has not been initialized, please make sure to call init_process_group."), 0),
        (RuntimeError("[gloo] Connection closed by peer"), 0),
        (ValueError("歌: connection"), 1),
    ],
    ids=["group gone", "peer gone", "its own"],
)
def test_a_rank_that_another_ones_end_cut_off_reports_no_failure_of_the_run(
    error: Exception, reported: int, tmp_path: Path
) -> None:
    run = RunDirectory(f"file://{tmp_path}")
    with pytest.raises(type(error)), _telling_failures(run):
        raise error
    assert run.store.exists(FAILURE) == bool(reported)

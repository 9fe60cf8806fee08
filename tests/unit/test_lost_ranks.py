"""What people are told of a rank that was lost, from what Ray says."""

import pytest

from trainer.driver.attempt import why_lost

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

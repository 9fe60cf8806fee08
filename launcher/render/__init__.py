"""What is sent to a cluster, as plain values: pure functions."""

from typing import Any


def inside(value: Any, *keys: str) -> Any:
    """What ``value`` holds below ``keys``; None where the way ends: Kubernetes leaves out what is empty."""
    for key in keys:
        value = value.get(key) if value else None
    return value

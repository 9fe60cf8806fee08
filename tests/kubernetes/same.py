"""Two runs of one job that have to be the same to the last bit."""

import json
from io import BytesIO
from typing import Any

import torch
from safetensors.torch import load

from launcher.runs import Run

LEARNT = ("train/loss", "train/grad_norm", "train/lr", "validation/", "audio/")
"""Beginnings of the metrics that do not depend on how long something took."""


def same_bits(one: Run, other: Run) -> None:
    """Fails unless both have the same adapter and have told every step once, with the same losses."""
    first, second = (load(run.store.get("adapter/adapter_model.safetensors")) for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert learnt(one) == learnt(other)
    steps = [step for step, key, _ in learnt(one) if key == "train/loss"]
    assert steps == list(range(1, one.job.train.steps + 1))


def learnt(run: Run) -> list[tuple[int, str, float]]:
    """(step, metric, value) in the journal's order."""
    entries: list[dict[str, Any]] = [json.loads(line) for line in BytesIO(run.store.get("metrics.jsonl"))]
    return [
        (entry["step"], key, value)
        for entry in entries
        for key, value in entry.get("metrics", {}).items()
        if key.startswith(LEARNT)
    ]

"""Whoever is told that its machine goes stops together with all others, in one step, with a checkpoint of it.

Two ranks without Ray; one run is given notice, another of the same job never: they end equal in every bit.
"""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.plan import plan
from launcher.runs import create_or_resume
from tests.cluster.ranks import Ranks, rank_of
from tests.waiting import eventually
from trainer.data.prepare import prepare
from trainer.spec import load_job

STEPS, VALIDATED_EVERY, COMMITTED_EVERY = 24, 4, 24
ENDED_AS_ASKED = 128 + signal.SIGTERM
JOB = """\
name: tsuyu
store: file://{folder}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}}
method: {method}
data:
  train: [{{dataset: file://{songs}}}]
  validation: {{fraction: 0.25, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 8}}}}
train: {{steps: {steps}, strategy: {strategy}, batch: {{seconds: 40, micro_seconds: 10}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: {committed}}}
validation:
  every: {validated}
  prompts: [{{tags: "梅雨 雨音", seconds: 0.5, seed: 1}}]
cluster: {{backend: local, workers: 2}}
"""
LORA, FULL = "{type: lora, rank: 4, alpha: 8, dropout: 0.2}", "{type: full}"


def rank_told(run_url: str, told: int, step: int) -> None:
    """A rank; of all ranks, ``told`` alone is given notice, in the step of that number."""
    import torch.distributed as dist

    from trainer.worker import run_rank

    dist.init_process_group("gloo")
    steps = itertools.count(1)
    done = run_rank(run_url, lambda: dist.get_rank() == told and next(steps) >= step)
    dist.destroy_process_group()
    assert not done


def attempt(run: Path, rank: Callable[..., None] = rank_of, *arguments: int) -> Ranks:
    return Ranks(2, run.parent, rank, f"file://{run}", *arguments, UTAFORGE_HOME=str(run.parent / "home"))


def commits(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/*/manifest.json"))


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learnt(run: Path) -> list[tuple[int, str, float]]:
    return [
        (entry["step"], key, value)
        for entry in journal(run)
        for key, value in entry.get("metrics", {}).items()
        if key.startswith(("train/", "validation/", "audio/"))
    ]


def trained(folder: Path, name: str, method: str, strategy: str) -> Path:
    """The directory of a new run in a store of its own."""
    path = folder / f"{name}.yaml"
    text = JOB.format(
        folder=folder / "宿" / name,
        songs=folder / "songs",
        method=method,
        strategy=strategy,
        steps=STEPS,
        validated=VALIDATED_EVERY,
        committed=COMMITTED_EVERY,
    )
    path.write_text(text, encoding="utf-8")
    job = load_job(str(path))
    prepare(job)
    return Path(create_or_resume(job, plan(job).as_json()).run.url.removeprefix("file://"))


def same_in_every_bit(one: Path, other: Path, weights: str) -> None:
    assert learnt(other) == learnt(one)
    states = [str(path.relative_to(one)) for path in one.glob(f"checkpoints/step-{STEPS:08d}/*.safetensors")]
    assert states
    for file in (weights, *states):
        expected, found = (load_file(run / file) for run in (one, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    kept = [{name: result[name] for name in ("steps", "loss_before", "loss_after", "best_step")} for result in results]
    assert kept[0] == kept[1]


@pytest.mark.timeout(1800)
def test_a_run_given_notice_twice_ends_as_the_one_that_was_not(tmp_path: Path) -> None:
    whole, noticed = (trained(tmp_path, name, LORA, "ddp") for name in ("whole", "noticed"))
    attempt(whole).end()

    attempt(noticed, rank_told, 1, 3).end()
    assert commits(noticed) == [3]
    assert journal(noticed)[-1]["end"] == "KILLED"

    asked = attempt(noticed)
    eventually(lambda: "step 6/" in asked.logs[0].read_text(encoding="utf-8"))
    assert asked.processes[1].pid
    os.kill(asked.processes[1].pid, signal.SIGTERM)
    for process in asked.processes:
        process.join(300)
    assert [process.exitcode for process in asked.processes] == [ENDED_AS_ASKED] * 2
    assert 6 <= commits(noticed)[-1] < STEPS
    for rank in range(2):
        said = (noticed / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8")
        for step in commits(noticed):
            assert f"given notice: stopped at step {step} with a checkpoint\n" in said

    attempt(noticed).end()
    assert [entry["end"] for entry in journal(noticed) if "end" in entry] == ["FINISHED"]
    same_in_every_bit(whole, noticed, "adapter/adapter_model.safetensors")


@pytest.mark.timeout(1800)
def test_a_full_fine_tune_given_notice_where_validation_is_due_commits_the_shares_of_all_ranks(tmp_path: Path) -> None:
    whole, noticed = (trained(tmp_path, name, FULL, "zero2") for name in ("whole", "noticed"))
    attempt(whole).end()
    attempt(noticed, rank_told, 0, VALIDATED_EVERY).end()
    assert commits(noticed) == [VALIDATED_EVERY]
    attempt(noticed).end()
    same_in_every_bit(whole, noticed, "model/model.safetensors")

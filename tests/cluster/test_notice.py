"""Whoever is told that its machine goes stops together with all others, at one step, with a checkpoint of it.

Two ranks without Ray; one run is given notice three times, another never: they end equal in every bit.
"""

import itertools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.plan import plan
from launcher.runs import create_or_resume
from tests.cluster.conftest import eventually
from tests.cluster.ranks import Ranks, rank_of
from trainer.data.prepare import prepare
from trainer.spec import load_job

STEPS = 40
ASKED_TO_END = 128 + signal.SIGTERM
JOB = """\
name: tsuyu
store: file://{folder}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}}
method: {method}
data:
  train: [{{dataset: file://{songs}}}]
  validation: {{fraction: 0.2, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 10}}}}
train: {{steps: 40, strategy: {strategy}, batch: {{seconds: 60, micro_seconds: 20}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: 20}}
validation:
  every: 5
  prompts: [{{tags: "梅雨 雨音", seconds: 0.5, seed: 1}}]
cluster: {{backend: local, workers: 2}}
"""


def rank_told_at(run_url: str, told: int, step: int) -> None:
    """A rank of which only ``told`` is given notice, in the ``step``-th step that it makes."""
    import torch.distributed as dist

    from trainer.worker import run_rank

    dist.init_process_group("gloo")
    steps = itertools.count(1)
    done = run_rank(run_url, lambda: dist.get_rank() == told and next(steps) >= step)
    dist.destroy_process_group()
    assert not done


def attempt(run: Path, target=rank_of, *arguments: object) -> Ranks:
    return Ranks(2, run.parent, target, f"file://{run}", *arguments, UTAFORGE_HOME=str(run.parent / "home"))


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


def stopped(run: Path, times: int) -> list[int]:
    """The steps at which both ranks say that they have stopped."""
    said = [(run / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    steps = [[int(line.split()[-4]) for line in text.splitlines() if "given notice" in line] for text in said]
    assert steps[0] == steps[1]
    assert len(steps[0]) == times
    return steps[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "strategy", "weights"),
    [
        ("{type: lora, rank: 4, alpha: 8, dropout: 0.2}", "ddp", "adapter/adapter_model.safetensors"),
        ("{type: full}", "zero2", "model/model.safetensors"),
    ],
)
def test_a_run_given_notice_three_times_ends_as_the_one_that_was_not(
    method: str, strategy: str, weights: str, tmp_path: Path
) -> None:
    runs: list[Path] = []
    for name in ("whole", "noticed"):
        path = tmp_path / f"{name}.yaml"
        store = tmp_path / "宿" / name
        text = JOB.format(folder=store, songs=tmp_path / "songs", method=method, strategy=strategy)
        path.write_text(text, encoding="utf-8")
        job = load_job(str(path))
        prepare(job)
        create_or_resume(job, plan(job).as_json())
        runs.append(store / "runs" / "tsuyu")
    whole, noticed = runs
    attempt(whole).end()

    attempt(noticed, rank_told_at, 1, 3).end()
    assert commits(noticed) == stopped(noticed, 1) == [3]
    assert journal(noticed)[-1]["end"] == "KILLED"

    attempt(noticed, rank_told_at, 0, 2).end()  # in a step after which validation is due
    assert commits(noticed) == stopped(noticed, 2) == [3, 5]

    asked = attempt(noticed)
    eventually(lambda: "step 7/" in asked.logs[0].read_text(encoding="utf-8"))
    assert asked.processes[1].pid
    os.kill(asked.processes[1].pid, signal.SIGTERM)
    for process in asked.processes:
        process.join(100)
    assert [process.exitcode for process in asked.processes] == [ASKED_TO_END] * 2
    *_, last = stopped(noticed, 3)
    assert 7 <= last < STEPS
    assert commits(noticed)[-1] == last

    attempt(noticed).end()
    assert learnt(noticed) == learnt(whole)
    assert [entry["end"] for entry in journal(noticed) if "end" in entry] == ["FINISHED"]
    same_tensors(whole, noticed, weights)


def same_tensors(whole: Path, noticed: Path, weights: str) -> None:
    files: Sequence[str] = [
        weights,
        *(str(p.relative_to(whole)) for p in whole.glob("checkpoints/step-00000040/*.safetensors")),
    ]
    for file in files:
        expected, found = (load_file(run / file) for run in (whole, noticed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = [json.loads((run / "result.json").read_text()) for run in (whole, noticed)]
    kept = [{name: result[name] for name in ("steps", "loss_before", "loss_after", "best_step")} for result in results]
    assert kept[0] == kept[1]

"""A full fine-tune on two ranks: each uploads its share of a checkpoint; ``kill -9`` of both, and going on is exact."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from launcher.plan import plan
from launcher.runs import create_or_resume
from tests.cluster.ranks import Ranks, rank_of
from tests.waiting import eventually
from trainer.data.prepare import prepare
from trainer.spec import load_job

WORLD = 2
JOB = """\
name: hanabi
store: file://{folder}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}}
method: {{type: full}}
data:
  train: [{{dataset: file://{songs}}}]
  validation: {{fraction: 0.25, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 8}}}}
train: {{steps: 12, strategy: zero2, batch: {{seconds: 60, micro_seconds: 10}}, log_every: 1}}
checkpoint: {{every: 4}}
cluster: {{backend: local, workers: 2}}
"""


def attempt(run: Path) -> Ranks:
    return Ranks(WORLD, run.parent, rank_of, f"file://{run}", UTAFORGE_HOME=str(run.parent / "home"))


def commits(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/*/manifest.json"))


def learnt(run: Path) -> list[tuple[int, str, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (entry["step"], key, value)
        for entry in entries
        for key, value in entry.get("metrics", {}).items()
        if key.startswith(("train/", "validation/"))
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Two runs of one job: one to its end, one killed on the way and gone on with."""
    folder = tmp_path_factory.mktemp("花")
    made: list[Path] = []
    for name in ("whole", "killed"):
        path = folder / f"{name}.yaml"
        path.write_text(JOB.format(folder=folder / name, songs=folder / "songs"), encoding="utf-8")
        job = load_job(str(path))
        prepare(job)
        create_or_resume(job, plan(job).as_json())
        made.append(folder / name / "runs" / "hanabi")
    whole, killed = made
    attempt(whole).end()
    first = attempt(killed)
    eventually(lambda: commits(killed))
    first.kill()
    assert commits(killed)[-1] < 12
    attempt(killed).end()
    return made


@pytest.mark.timeout(1800)
def test_a_killed_full_fine_tune_goes_on_exactly(runs: Sequence[Path]) -> None:
    whole, killed = runs
    assert "going on from step" in (killed.parent / "rank-0-of-2.txt").read_text(encoding="utf-8")
    assert learnt(killed) == learnt(whole)
    one, other = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_every_rank_has_its_own_files_in_a_checkpoint(runs: Sequence[Path]) -> None:
    manifest = json.loads(next(runs[0].glob("checkpoints/*/manifest.json")).read_text(encoding="utf-8"))
    shares = {name for name in manifest["files"] if name.endswith(".safetensors")}
    assert len(shares) >= WORLD


def test_nobody_is_told_what_only_pytorch_can_want_to_know(runs: Sequence[Path]) -> None:
    said = "".join(log.read_text(encoding="utf-8") for run in runs for log in run.parent.glob("rank-*.txt"))
    assert "step 12/12" in said
    assert "Warning" not in said
    assert "Traceback" not in said

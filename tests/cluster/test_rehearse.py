"""Every job that ships with utaforge is rehearsed: its own family, method and codec, on one real cluster."""

import json
from pathlib import Path

import pytest
import soundfile

from tests.cluster.conftest import Utaforge
from trainer.spec import load_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2700)]
JOBS = sorted(path for path in (Path(__file__).parents[2] / "jobs").glob("*.yaml") if path.name != "demo.yaml")
FAMILIES = {"ace_step", "fish_speech", "heartmula", "musicgen", "songbloom"}


def test_all_jobs_rehearse_on_one_cluster(utaforge: Utaforge) -> None:
    told = json.loads(utaforge.output("rehearse", "--json", *map(str, JOBS)))
    assert [one["name"] for one in told] == [path.stem.replace("_", "-") for path in JOBS]
    families = set()
    for path, one in zip(JOBS, told, strict=True):
        wanted = load_job(str(path), to_run=False)
        run = Path(one["folder"]) / "runs" / one["name"]
        families.add(json.loads((run / "job.json").read_text(encoding="utf-8"))["model"]["family"])
        songs = sorted(run.glob("audio/step-00000020/prompt-*"))
        assert len(songs) == 2
        assert all(soundfile.info(song).frames > 0 for song in songs)
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        steps = [
            entry["step"]
            for entry in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "train/loss" in entry.get("metrics", {})
        ]
        assert steps == list(range(1, 21))
        assert any("a rank killed after step" in line for line in one["exercised"])
        assert any(line.startswith('store: "s3://') for line in one["replaced"])
        assert f"train.steps: {wanted.train.steps} → 20" in one["replaced"]
    assert families == FAMILIES
    assert utaforge.left_running() == []

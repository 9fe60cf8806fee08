"""``jobs/demo.yaml`` by the command of the README, and everything that it has to leave."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from peft import PeftModel
from torch import nn

from tests.cluster.conftest import Said, Utaforge
from trainer.data.dataset import Dataset, split
from trainer.data.loader import validation_batches
from trainer.families import open_family
from trainer.families.base import Family
from trainer.rundir import RunDirectory
from trainer.spec.data import HeldOut

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2700)]
ROOT = Path(__file__).parents[2]
STEPS = 60
"""A quarter of those that people see: enough to close half of the gap."""
CARD = ROOT / "trainer" / "builtin" / "pocket" / "card.json"


@dataclass(frozen=True)
class Demo:
    """The finished demo."""

    said: Said
    folder: Path
    run: RunDirectory

    @property
    def result(self) -> dict[str, float]:
        return json.loads(self.run.store.get("result.json"))

    @property
    def steps(self) -> int:
        return self.run.job.train.steps

    def multiples(self, *every: int) -> list[int]:
        """Steps after which something that is done every so many steps is done; the last one is always among them."""
        return sorted({step for one in every for step in range(one, self.steps + 1, one)} | {self.steps})


@pytest.fixture(scope="module")
def demo(utaforge: Utaforge) -> Demo:
    said = utaforge("submit", str(ROOT / "jobs" / "demo.yaml"), "--yes", "--set", f"train.steps={STEPS}")
    assert said.code == 0, said.text
    folder = utaforge.folder / "store" / "runs" / "demo"
    return Demo(said, folder, RunDirectory(f"file://{folder}"))


@dataclass(frozen=True)
class Tracked:
    """The demo's run in MLflow."""

    client: MlflowClient
    run: Run

    def history(self, key: str) -> dict[int, float]:
        return {point.step: point.value for point in self.client.get_metric_history(self.run.info.run_id, key)}


@pytest.fixture(scope="module")
def tracked(demo: Demo, utaforge: Utaforge) -> Tracked:
    client = MlflowClient(utaforge.mlflow)
    (experiment,) = client.search_experiments(filter_string="name = 'demo'")
    (run,) = client.search_runs([experiment.experiment_id])
    return Tracked(client, run)


def test_the_summary_says_what_was_reached_and_where_everything_is(demo: Demo, utaforge: Utaforge) -> None:
    summary = demo.said.text[demo.said.text.index("run demo is finished") :]
    result = demo.result
    assert (
        f"held-out loss: {result['loss_before']:.4f} → {result['loss_after']:.4f} after {demo.steps} steps" in summary
    )
    for name in ("adapter", "checkpoints", "audio"):
        assert f"  {name}: {demo.folder / name}\n" in summary
        assert any((demo.folder / name).iterdir())
    assert re.search(r"MLflow: http://127\.0\.0\.1:5000 .*make ui", summary)
    assert "utaforge generate demo" in summary
    assert "Traceback" not in demo.said.text
    assert utaforge.left_running() == []


def test_the_progress_lines_tell_rate_and_time_left(demo: Demo) -> None:
    assert re.search(r"^prepared (\d+)/\1 songs", demo.said.text, re.MULTILINE)
    line = rf"^step (\d+)/{demo.steps} · loss [\d.]+ · [\d.]+ steps/s · .+ left$"
    job = demo.run.job
    logged = demo.multiples(job.train.log_every, job.checkpoint.every, job.validation.every)
    assert [int(step) for step in re.findall(line, demo.said.text, re.MULTILINE)] == logged


def test_the_demo_closes_more_than_half_of_the_gap_to_a_model_trained_on_its_style(demo: Demo) -> None:
    losses = json.loads(CARD.read_text())["held_out_loss"]
    base, trained = losses["style b"], losses["style b, trained on b"]
    assert demo.result["loss_before"] == pytest.approx(base, rel=0.02)
    assert demo.result["loss_after"] < (base + trained) / 2


def test_list_and_status_show_the_run_finished(demo: Demo, utaforge: Utaforge) -> None:
    (listed,) = json.loads(utaforge.output("list", "--json", "--store", "file://./store"))
    status = json.loads(utaforge.output("status", "demo", "--json", "--store", "file://./store"))
    assert listed == status
    expected = {"name": "demo", "state": "finished", "attempts": 1, "backend": "local"}
    assert status == {**status, **expected, "step": demo.steps, "steps": demo.steps}
    assert status["url"] == f"file://{demo.folder}"
    assert 0 < status["loss"] < demo.result["loss_before"]


def test_mlflow_holds_parameters_versions_and_the_resolved_job(demo: Demo, tracked: Tracked) -> None:
    data, spec = tracked.run.data, demo.run.job
    assert (tracked.run.info.status, tracked.run.info.run_name) == ("FINISHED", "demo")
    assert data.params["method.type"] == "lora"
    assert data.params["train.optimizer.lr"] == str(spec.train.optimizer.lr)
    assert "祭り" in data.params["validation.prompts.0.tags"]
    assert data.params["validation.prompts.0.tags"] == spec.validation.prompts[0].tags
    assert re.fullmatch("[0-9a-f]{40}", data.tags["mlflow.source.git.commit"])
    pin = json.loads(demo.run.store.get("data.json"))["train"][0]
    (dataset,) = [one.dataset for one in tracked.run.inputs.dataset_inputs]
    assert dataset.digest == pin["digest"][:36] == Dataset.open(pin["url"]).digest[:36]
    job = json.loads(artifact(tracked, "job.json"))
    kept = json.loads(demo.run.store.get("job.json"))
    assert [job[name] for name in ("model", "train", "validation")] == [
        kept[name] for name in ("model", "train", "validation")
    ]


def test_mlflow_holds_the_curves(demo: Demo, tracked: Tracked) -> None:
    job = demo.run.job
    judged = demo.multiples(job.checkpoint.every, job.validation.every)
    logged = demo.multiples(job.train.log_every, job.checkpoint.every, job.validation.every)
    for key in ("train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_second", "speed/data_wait_share"):
        assert sorted(tracked.history(key)) == logged, key
    assert all(value > 0 for value in tracked.history("speed/tokens_per_second").values())
    assert all(0 <= value <= 1 for value in tracked.history("speed/data_wait_share").values())
    assert max(tracked.history("train/lr").values()) == pytest.approx(job.train.optimizer.lr, rel=0.02)
    assert tracked.history("system/cpu_percent")
    assert tracked.history("system/memory_gib")
    held_out = tracked.history("validation/loss")
    assert sorted(held_out) == [0, *judged]
    assert (held_out[0], held_out[demo.steps]) == (demo.result["loss_before"], demo.result["loss_after"])


def test_mlflow_holds_songs_that_play(demo: Demo, tracked: Tracked) -> None:
    validation = demo.run.job.validation
    assert validation.prompts
    for step in (0, *demo.multiples(validation.every)):
        for index, prompt in enumerate(validation.prompts):
            name = f"prompt-{index:02d}"
            song = artifact(tracked, f"audio/step-{step:08d}/{name}.{validation.format}")
            assert audible_seconds(song) == pytest.approx(prompt.seconds, abs=0.1)
            assert tracked.history(f"audio/{name}/duration_reached")[step] == pytest.approx(1, abs=0.01)


def test_peft_alone_loads_the_adapter_onto_a_fresh_base_with_the_same_held_out_loss(demo: Demo) -> None:
    family = open_family(demo.run.job.model)
    bare = family.network().eval()
    assert held_out_loss(demo, family, bare) == pytest.approx(demo.result["loss_before"], rel=1e-5)
    adapted = PeftModel.from_pretrained(bare, demo.folder / "adapter").eval()
    assert held_out_loss(demo, family, adapted) == pytest.approx(demo.result["loss_after"], rel=1e-5)


def test_generate_makes_more_songs_and_reports_their_measures(demo: Demo, utaforge: Utaforge) -> None:
    asked = ("--tags", "gentle, 子守唄", "--seconds", "2", "--n-samples", "2", "--output", "もっと")
    songs = json.loads(utaforge.output("generate", "demo", "--store", "file://./store", *asked, "--json"))
    assert [song["prompt"]["tags"] for song in songs] == ["gentle, 子守唄"] * 2
    written = [utaforge.folder / song["file"] for song in songs]
    assert sorted((utaforge.folder / "もっと").iterdir()) == written
    assert written[0].read_bytes() != written[1].read_bytes()
    for song, path in zip(songs, written, strict=True):
        assert audible_seconds(path.read_bytes()) == pytest.approx(2, abs=0.1)
        assert song["measures"]["duration_reached"] == pytest.approx(1, abs=0.01)
        assert song["measures"]["silence_ratio"] < 1


def test_logs_print_what_every_rank_and_the_driver_said(demo: Demo, utaforge: Utaforge) -> None:
    text = utaforge.output("logs", "demo", "--store", "file://./store")
    for name in ("driver.log", "rank-0.log", "rank-1.log"):
        assert f"==> {name} <==\n" in text
    assert f"step {demo.steps}/{demo.steps} · held-out loss" in text


def artifact(tracked: Tracked, path: str) -> bytes:
    return Path(tracked.client.download_artifacts(tracked.run.info.run_id, path)).read_bytes()


def audible_seconds(file: bytes) -> float:
    """Length of a song, which must not be silent."""
    audio, rate = soundfile.read(io.BytesIO(file), always_2d=True)
    assert np.sqrt(np.mean(audio**2)) > 10 ** (-50 / 20)
    return len(audio) / rate


@torch.no_grad()
def held_out_loss(demo: Demo, family: Family, network: nn.Module) -> float:
    """Cross entropy per code of the songs that the demo holds out, by nothing but the network and its objective."""
    job, pin = demo.run.job, json.loads(demo.run.store.get("data.json"))["train"][0]
    assert isinstance(job.data.validation, HeldOut)
    data = Dataset.open(pin["url"], pin["version"])
    _, held_out = split([data], job.data.validation, job.train.seed)
    frames = {"micro_frames": 3000, "segment_frames": round(family.segment_seconds * family.frame_rate)}
    batches = validation_batches([data], held_out, family.collate, **frames)
    total = count = 0.0
    for batch, _ in batches:
        total += float(family.sums(network, batch)["ce"])
        count += batch.counts["ce"]
    return total / count

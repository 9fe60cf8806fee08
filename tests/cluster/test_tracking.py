"""Journals replayed to a real MLflow: an SQLite file, and a server that is killed and comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import eventually
from trainer.audio.write import encode
from trainer.spec import Job, dump_job
from trainer.store import open_store
from trainer.tracking import Follower, Journal, read

pytest.importorskip("mlflow")
LYRICS = "[verse] さくら さくら やよいの空は"


class Server:
    """``mlflow server`` on SQLite; one address, may be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", "artifacts",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        eventually(self.answers, 120)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def run(tmp_path):
    return open_store(f"file://{tmp_path}/store/runs/sakura")


def submit(run, tracking):
    job = Job.model_validate(
        {
            "name": "sakura",
            "store": "file:///somewhere",
            "model": {"family": "musicgen", "pretrained": "random:tiny"},
            "method": {"type": "lora"},
            "data": {"train": [{"dataset": "file:///songs"}]},
            "train": {"steps": 40, "batch": {"songs": 2}},
            "validation": {"prompts": [{"tags": f"童謡 {LYRICS}"}]},
            "tracking": tracking,
        }
    )
    run.create("job.json", dump_job(job).encode())
    run.put("plan.json", b'{"ranks": 2}')
    run.put("data.json", json.dumps({"train": [{"url": "file:///songs", "version": 1, "digest": "d" * 64}]}).encode())


def attempt(run, journal, first, last, end=None):
    for step in range(first, last + 1):
        journal.record(step, {"train/loss": 10 - step / 10, "train/lr": 1e-4})
    if end:
        journal.close(last, end)


def replay(run):
    command = [sys.executable, "-m", "trainer.tracking", run.url]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def mlflow_run(run):
    from mlflow import MlflowClient

    known = json.loads(run.get("mlflow.json"))
    client = MlflowClient(known["uri"])
    return client, client.get_run(known["run_id"])


def curve(run, key="train/loss"):
    client, found = mlflow_run(run)
    return [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, key)]


def told_once(run, last):
    return curve(run) == [(step, 10 - step / 10) for step in range(1, last + 1)]


def test_everything_about_a_run_is_in_the_default_sqlite(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UTAFORGE_HOME", str(tmp_path / "home"))
    submit(run, {})
    flac = encode(np.zeros((1, 1600), dtype=np.float32), 16000, "flac")
    run.put("audio/step-00000002/prompt-00.flac", flac)
    journal = Journal(run, tmp_path / "journal")
    follower = Follower(run.url, journal.path, drain_seconds=120)
    attempt(run, journal, 1, 2)
    journal.artifact(2, "audio/step-00000002/prompt-00.flac")
    journal.record(3, {"odd/nan": float("nan"), "odd/inf": float("inf")})
    journal.close(3, "FINISHED")
    assert follower.close()

    client, found = mlflow_run(run)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "sakura")
    assert curve(run) == [(1, 9.9), (2, 9.8)]
    assert np.isnan(found.data.metrics["odd/nan"])
    assert found.data.metrics["odd/inf"] > 1e300
    assert found.data.params["train.optimizer.lr"] == "0.0001"
    assert found.data.params["validation.prompts.0.tags"] == f"童謡 {LYRICS}"
    assert found.data.tags["utaforge.run"] == run.url
    assert found.data.tags["utaforge.dataset.0"] == f"file:///songs {'d' * 64}"
    assert [one.dataset.digest for one in found.inputs.dataset_inputs] == ["d" * 36]
    local = client.download_artifacts(found.info.run_id, "audio/step-00000002/prompt-00.flac", str(tmp_path))
    assert Path(local).read_bytes() == flac
    assert {info.path for info in client.list_artifacts(found.info.run_id)} == {"audio", "job.json", "plan.json"}


def test_a_server_killed_and_started_again_gets_everything_once(run, tmp_path, server):
    submit(run, {"mlflow": server.uri})
    journal = Journal(run, tmp_path / "journal")
    follower = Follower(run.url, journal.path, drain_seconds=60)
    attempt(run, journal, 1, 10)
    eventually(
        lambda: run.exists("mlflow.json") and json.loads(run.get("mlflow.json"))["run_id"] and told_once(run, 10)
    )
    server.kill()
    attempt(run, journal, 11, 30)
    server.start()
    attempt(run, journal, 31, 40, "FINISHED")
    assert follower.close()
    assert told_once(run, 40)


def test_a_killed_run_is_marked_so_and_goes_on_as_the_same_mlflow_run(run, tmp_path, server):
    submit(run, {"mlflow": server.uri})
    code = (
        "import sys, pathlib; from trainer.store import open_store; from trainer.tracking import Follower, Journal\n"
        "run = open_store(sys.argv[1]); journal = Journal(run, pathlib.Path(sys.argv[2]))\n"
        "follower = Follower(run.url, journal.path)\n"
        "for step in range(1, 31): journal.record(step, {'train/loss': 10 - step / 10, 'train/lr': 1e-4})\n"
        "journal.mirror.now(); sys.stdin.read()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, run.url, str(tmp_path / "one")], stdin=subprocess.PIPE)
    eventually(
        lambda: run.exists("mlflow.json") and json.loads(run.get("mlflow.json"))["run_id"] and told_once(run, 30)
    )
    before = json.loads(run.get("mlflow.json"))
    worker.kill()
    worker.wait()
    eventually(lambda: mlflow_run(run)[1].info.status == "KILLED")

    journal = Journal(run, tmp_path / "two", step=20)
    follower = Follower(run.url, journal.path, drain_seconds=60)
    eventually(lambda: mlflow_run(run)[1].info.status == "RUNNING")
    attempt(run, journal, 21, 40, "FINISHED")
    assert follower.close()
    assert json.loads(run.get("mlflow.json")) == before
    assert told_once(run, 40)
    assert mlflow_run(run)[1].info.status == "FINISHED"
    assert [entry["step"] for entry in read(run) if "metrics" in entry] == list(range(1, 41))


def test_without_mlflow_nothing_is_lost_and_sync_tells_it_later(run, tmp_path, server, caplog):
    submit(run, {"mlflow": "http://127.0.0.1:9"})
    journal = Journal(run, tmp_path / "journal")
    follower = Follower(run.url, journal.path, drain_seconds=0.2)
    attempt(run, journal, 1, 40)
    journal.close(40, "FINISHED")
    assert not follower.close()
    assert f"kept in {run.url}/metrics.jsonl" in caplog.text
    assert "`utaforge sync sakura`" in caplog.text

    refused = replay(run)
    assert refused.returncode == 1
    assert "MLflow at http://127.0.0.1:9 is out of reach" in refused.stderr
    assert "Traceback" not in refused.stderr
    run.delete(["job.json"])
    submit(run, {"mlflow": server.uri})
    assert [replay(run).returncode, replay(run).returncode] == [0, 0]
    assert told_once(run, 40)


def test_many_runs_may_meet_an_empty_sqlite_file_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("UTAFORGE_HOME", str(tmp_path / "home"))
    runs = [open_store(f"file://{tmp_path}/store/runs/uta-{number}") for number in range(2)]
    for number, run in enumerate(runs):
        submit(run, {})
        attempt(run, Journal(run, tmp_path / f"journal-{number}"), 1, 3, "FINISHED")
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(replay, runs))
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert all(told_once(run, 3) for run in runs)

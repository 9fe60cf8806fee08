import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.backends.kubernetes_api import Api
from tests.unit.launcher.server import Server
from trainer.spec import Job, load_job

JOB = """\
name: demo
store: {store}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 10}}
method: {{type: lora}}
data:
  train: [{{dataset: {store}/datasets/demo}}]
train:
  steps: 120
  batch: {{seconds: 60}}
checkpoint: {{every: 40}}
validation:
  prompts: [{{tags: "gentle, 子守唄", seconds: 8}}]
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def job_file(tmp_path: Path, store: str) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(JOB.format(store=store), encoding="utf-8")
    return path


@pytest.fixture
def job(job_file: Path) -> Callable[..., Job]:
    """A job, with overrides as for ``--set``."""
    return lambda *overrides: load_job(job_file, overrides)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def kubeconfig(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {
        "clusters": [{"name": "箱", "cluster": {"server": server.url}}],
        "users": [{"name": "歌", "user": {"token": "secret"}}],
        "contexts": [{"name": "uta", "context": {"cluster": "箱", "user": "歌"}}],
        "current-context": "uta",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@pytest.fixture
def api(kubeconfig: Path) -> Api:
    return Api()

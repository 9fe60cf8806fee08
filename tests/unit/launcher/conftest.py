from collections.abc import Callable
from pathlib import Path

import pytest

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

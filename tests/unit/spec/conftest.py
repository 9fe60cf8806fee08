from pathlib import Path

import pytest

JOB = """\
name: uta
store: s3://music
model:
  family: musicgen
  pretrained: builtin:pocket
method: {type: lora}
data:
  train: [{dataset: s3://music/datasets/ja}]
train:
  steps: 100
  batch: {seconds: 60}
validation:
  prompts:
    - {tags: "祭り, 笛", seconds: 8}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a job file (the smallest one, with replacements) to job.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def _write(*replacements: tuple[str, str], text: str = JOB) -> str:
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        Path("job.yaml").write_text(text, encoding="utf-8")
        return "job.yaml"

    return _write

"""A sixth family is a folder and a line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import trainer

PACKAGE = Path(trainer.__file__).parent
JOB = """\
name: koto
store: file:///箏
model: {family: koto, pretrained: "random:tiny"}
method: {type: lora, preset: koto/attention}
data: {train: [{dataset: file:///箏/songs}]}
train: {steps: 10, batch: {seconds: 30}}
"""
OPENED = """\
import json
from trainer.families import open_family
from trainer.spec import load_job
from trainer.spec.families import FAMILIES, dims_of
job = load_job("koto.yaml")
network = open_family(job.model).network()
parameters = sum(p.numel() for p in network.parameters())
print(json.dumps([FAMILIES["koto"].title, type(job.model).__name__, parameters == dims_of(job.model).parameters]))
"""


def test_a_folder_and_a_line_are_all_that_a_sixth_family_takes(tmp_path):
    house = shutil.copytree(PACKAGE, tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    room = shutil.copytree(house / "families" / "musicgen", house / "families" / "koto")
    for file in room.glob("*.py"):
        text = file.read_text(encoding="utf-8").replace('title="MusicGen"', 'title="箏"')
        text = re.sub(r"\bMusicGen\b", "Koto", text).replace("families.musicgen", "families.koto")
        file.write_text(text.replace('"musicgen', '"koto'), encoding="utf-8")
    registry = house / "spec" / "families.py"
    registry.write_text(registry.read_text(encoding="utf-8").replace('"musicgen", ', '"musicgen", "koto", ', 1))
    (tmp_path / "koto.yaml").write_text(JOB, encoding="utf-8")

    def said(*program: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert '"const": "koto"' in said("-m", "launcher.cli", "schema")
    assert json.loads(said("-c", OPENED)) == ["箏", "Koto", True]

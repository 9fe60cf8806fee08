"""How the driver ends, without Ray: in processes of its own, as Ray starts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.driver.attempt import seconds_left, within_budget
from trainer.rundir import RunDirectory
from trainer.spec import dump_job, load_job
from trainer.spec.cluster import Budget
from trainer.spec.errors import ClusterError, StoreError, TrainingError

ROOT = Path(__file__).parents[2]
JOB = """\
name: uta
store: {store}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 10}}
method: {{type: lora}}
data: {{train: [{{dataset: {store}/歌}}]}}
train: {{steps: 9, batch: {{seconds: 60}}}}
validation: {{prompts: [{{tags: 子守唄, seconds: 8}}]}}
"""


def run_with_budget(folder: Path, hours: float) -> RunDirectory:
    """A run in its first attempt."""
    (folder / "job.yaml").write_text(JOB.format(store=f"file://{folder}"), encoding="utf-8")
    job = load_job(folder / "job.yaml").model_copy(update={"budget": Budget(hours=hours)})
    run = RunDirectory(f"file://{folder}/runs/uta")
    run.store.put("job.json", dump_job(job).encode())
    run.store.put("attempts/0001.json", b"{}")
    return run


def driver(url: str, code: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The driver of the trainer at ``code``, and what it said."""
    command = [sys.executable, "-m", "trainer.driver", url]
    told = {**os.environ, **variables, "PYTHONPATH": str(code)}
    return subprocess.run(command, cwd=code, env=told, capture_output=True, text=True)


@pytest.fixture
def kuberay(tmp_path: Path) -> dict[str, str]:
    """Variables as KubeRay sets them, and a stand-in for Ray's own client that writes down what it is asked to stop."""
    client = tmp_path / "stand-in" / "ray"
    client.mkdir(parents=True)
    (client / "__init__.py").touch()
    stop = f'import os\n        open("{tmp_path}/stopped", "a").write(submission)\n        os._exit(143)'
    (client / "job_submission.py").write_text(
        "class JobSubmissionClient:\n"
        "    def __init__(self, address): ...\n"
        f"    def stop_job(self, submission):\n        {stop}\n"
    )
    told = json.dumps({"metadata": {"job_submission_id": "uta-1-歌"}})
    return {"KUBERAY_GEN_RAY_START_CMD": "ray start", "RAY_JOB_CONFIG_JSON_ENV_VAR": told}


def overlay(tmp_path: Path, **replaced: str) -> Path:
    """A copy of the trainer beside the stand-in, with other modules: name → code."""
    code = tmp_path / "stand-in"
    shutil.copytree(ROOT / "trainer", code / "trainer", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name, text in replaced.items():
        (code / "trainer" / f"{name}.py").write_text(text, encoding="utf-8")
    return code


def test_a_store_that_refuses_even_the_log_is_told_and_ends_the_run_for_good(
    tmp_path: Path, kuberay: dict[str, str]
) -> None:
    (tmp_path / "歌").write_bytes(b"")
    ended = driver(f"file://{tmp_path}/歌/runs/uta", overlay(tmp_path), **kuberay)
    assert "a file stands where a folder should be" in ended.stdout
    assert "  → move it away, or choose another place" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert (tmp_path / "stopped").read_text() == "uta-1-歌"


@pytest.mark.parametrize("module", ["checkpoint", "store"])
def test_code_that_cannot_be_imported_is_told_and_ends_the_run_for_good(
    tmp_path: Path, kuberay: dict[str, str], module: str
) -> None:
    run = run_with_budget(tmp_path, 1)
    ended = driver(run.url, overlay(tmp_path, **{module: "歌 = ("}), **kuberay)
    told = "the trainer met an error of its own: SyntaxError: '(' was never closed"
    assert told in ended.stdout
    assert f"{module}.py" in ended.stdout + ended.stderr
    assert (tmp_path / "stopped").read_text() == "uta-1-歌"
    if module != "store":
        with pytest.raises(TrainingError, match="'\\(' was never closed"):
            run.raise_reported_failure()


def test_elsewhere_the_exit_status_is_the_errors(tmp_path: Path) -> None:
    (tmp_path / "歌").write_bytes(b"")
    assert driver(f"file://{tmp_path}/歌/runs/uta").returncode == StoreError.exit_code


@pytest.mark.parametrize(
    ("began", "left"), [(1000.0, 7200.0), (1000.0 - 7000, 200.0), (1000.0 - 9000, -1800.0), (1000.0 + 60, 7200.0)]
)
def test_what_is_left_of_a_budget_counts_from_the_first_begin_whatever_clock_is_behind(
    began: float, left: float
) -> None:
    assert seconds_left(2, began, 1000.0) == left


def test_every_cluster_of_an_attempt_has_the_same_begin_and_the_next_attempt_another(tmp_path: Path) -> None:
    first = run_with_budget(tmp_path, 1)
    began = first.began()
    assert RunDirectory(first.url).began() == began
    first.store.put("attempts/0002.json", b"{}")
    assert RunDirectory(first.url).began() > began


def test_a_cluster_that_comes_when_the_hours_are_over_ends_the_run_at_once(tmp_path: Path) -> None:
    run = run_with_budget(tmp_path, 1)
    run.store.put("began/0001.json", json.dumps({"time": 1000.0}).encode())
    with pytest.raises(ClusterError, match="the budget's hours are over") as caught, within_budget(run):
        pytest.fail("it has begun")
    assert "submit again" in caught.value.cure


def test_a_run_is_ended_wherever_it_stands_when_the_hours_are_over(tmp_path: Path) -> None:
    run = run_with_budget(tmp_path, 0.1 / 3600)
    program = (
        "import sys, threading\n"
        "from trainer.driver.attempt import within_budget\n"
        "from trainer.rundir import RunDirectory\n"
        "with within_budget(RunDirectory(sys.argv[1])):\n"
        "    threading.Event().wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", program, run.url], cwd=ROOT).returncode == ClusterError.exit_code
    with pytest.raises(TrainingError, match="the budget's hours are over"):
        run.raise_reported_failure()

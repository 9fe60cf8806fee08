import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import run
from launcher.doctor import examine
from launcher.runs import create_or_resume
from launcher.submit import Reader
from tests.unit.launcher.test_runs import attempted
from trainer.spec import Job

HEAVY = ("torch", "ray", "numpy", "pyarrow", "mlflow", "transformers")


def test_importing_and_planning_brings_in_neither_torch_nor_ray_nor_numpy(job_file: Path) -> None:
    program = (
        "import sys, launcher.cli, launcher.show, launcher.submit, launcher.doctor, launcher.backends.local\n"
        f"assert launcher.cli.run(['plan', {str(job_file)!r}, '--json']) == 0\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_tells_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n    {code} " in told for code in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 130))


def test_a_wrong_job_is_code_2_with_its_place(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file.write_text(job_file.read_text().replace("steps: 120", "stepz: 120"))
    assert run(["plan", str(job_file)]) == 2
    told = capsys.readouterr().err
    assert "demo.yaml:" in told
    assert "did you mean" in told
    assert "Traceback" not in told


def test_a_missing_run_is_code_3_and_wrong_usage_is_code_1(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "さくら", "--store", store]) == 3
    assert "there is no run 'さくら'" in capsys.readouterr().err
    assert run(["status"]) == 1
    assert "Missing argument 'RUN'" in capsys.readouterr().err


def test_a_bill_that_nobody_can_tell_is_asked_about_and_nothing_is_sent_without_a_yes(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(job_file.with_name("無い")))
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    cluster = "cluster={backend: kubernetes, profile: cpu, image: 'uta:1'}"
    overrides = ("store=s3://uta", "data.train.0.dataset=s3://uta/歌", cluster)
    given = [part for each in overrides for part in ("--set", each)]
    assert run(["submit", str(job_file), *given]) == 130
    told = capsys.readouterr()
    assert "The bill for this is unknown: the time is not known. Go on?" in told.out
    assert "kubeconfig" not in told.err


def test_cancelling_what_does_not_run_is_code_5(
    job: Callable[..., Job], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_or_resume(job(), {})
    assert run(["cancel", "demo", "--store", store]) == 5
    assert "run demo is not running: it is stopped at step 0 of 120" in capsys.readouterr().err


def test_why_shows_cause_evidence_and_cure(
    job: Callable[..., Job], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attempted(create_or_resume(job(), {}).run, 1.0)
    found = create_or_resume(job(), {}).run
    failure = {"time": 2.0, "attempt": 1, "problem": "音が出ない", "cure": "弦を張る", "exit_code": 6}
    found.store.put("failure.json", json.dumps(failure, ensure_ascii=False).encode())
    assert run(["why", "demo", "--store", store]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run demo: failed at step 0 of 120",
        "1. 音が出ない",
        "   seen in failure.json: exit code 6",
        "   → 弦を張る",
    ]
    assert run(["why", "demo", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["causes"][0]["what"] == "音が出ない"


def test_down_of_what_has_nothing_left_says_so_and_keeps_the_run_directory(
    job: Callable[..., Job], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attempted(create_or_resume(job(), {}).run, 1.0)
    assert run(["down", "demo", "--store", store]) == 0
    assert capsys.readouterr().out == "nothing is left of run demo\n"
    assert run(["down", "--all", "--store", store]) == 0
    assert run(["status", "demo", "--store", store]) == 0
    assert run(["down", "--store", store]) == 1


def test_status_and_list_speak_json(
    job: Callable[..., Job], job_file: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_or_resume(job(), {})
    assert run(["status", "demo", "--job", str(job_file), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["name"], status["state"], status["steps"]) == ("demo", "stopped", 120)
    assert run(["list", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [status]


def test_the_store_of_commands_is_taken_from_the_environment(
    job: Callable[..., Job], store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_or_resume(job(), {})
    monkeypatch.setenv("UTAFORGE_STORE", store)
    assert run(["list"]) == 0
    assert "demo" in capsys.readouterr().out


def test_following_ends_with_how_the_run_has_ended(
    job: Callable[..., Job], store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempted(create_or_resume(job(), {}).run, 1.0)
    found = create_or_resume(job(), {}).run
    failure = {"time": 2.0, "attempt": 1, "problem": "音が出ない", "cure": "弦を張る", "exit_code": 6}
    found.store.put("failure.json", json.dumps(failure, ensure_ascii=False).encode())
    monkeypatch.setattr(type(found), "live_log", lambda _: iter(["始めます"]))
    assert run(["logs", "-f", "demo", "--store", store]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("始めます\n", "run demo is failed at step 0 of 120: 音が出ない\n")


def test_logs_are_told_file_by_file(job: Callable[..., Job], store: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = create_or_resume(job(), {}).run
    made.store.put("logs/driver.log", "始めます\n".encode())
    assert run(["logs", "demo", "--store", store]) == 0
    assert capsys.readouterr().out == "==> driver.log <==\n始めます\n"


def test_the_schema_is_json(tmp_path: Path) -> None:
    place = tmp_path / "スキーマ.json"
    assert run(["schema", "--output", str(place)]) == 0
    assert "properties" in json.loads(place.read_text(encoding="utf-8"))


def test_the_doctor_names_what_is_missing_and_its_cure(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in examine(store)}
    assert not found["g++"].ok
    assert found["g++"].cure == "DeepSpeed compiles an operator with it: apt install g++"
    assert found[f"store {store}"].found == "writable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_doctor_finds_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = {check.name: check for check in examine(f"file://{tmp_path}/store")}
    assert not found[f"store file://{tmp_path}/store"].ok


def test_the_doctor_finds_a_store_behind_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    url = f"file://{tmp_path}/file/store"
    found = {check.name: check for check in examine(url)}
    assert not found[f"store {url}"].ok
    assert found[f"store {url}"].cure


def test_the_doctor_asks_the_jobs_mlflow(job: Callable[..., Job], store: str) -> None:
    found = {check.name: check for check in examine(store, job("tracking.mlflow=http://127.0.0.1:1"))}
    assert not found["MLflow http://127.0.0.1:1"].ok


def test_a_fault_of_our_own_leaves_one_line_and_a_file(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("零で割った")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trainer.spec.load_job", broken)
    assert run(["plan", str(job_file)]) == 1
    told = capsys.readouterr().err
    assert "this is a fault of utaforge itself: ZeroDivisionError: 零で割った" in told
    assert "Traceback" not in told
    (report,) = tmp_path.glob("utaforge-error-*.txt")
    assert "Traceback" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("(RayTrainWorker pid=3368) step 5/120 · 損失 4.2", "step 5/120 · 損失 4.2"),
        ("\x1b[36m(RayTrainWorker pid=3368, ip=127.0.0.1)\x1b[0m done", "done"),
        ("(TrainController pid=3220) Requesting resources: {'CPU': 1} * 2", None),
        ("2026-11-21 04:36:10,679\tINFO worker.py:1691 -- Using address 127.0.0.1:27421", None),
        ("(RayTrainWorker pid=1) Setting up process group for: env:// [rank=0, world_size=2]", None),
        ("(pid=gcs_server) [2026-11-21 20:59:49,643 E 9 9] (gcs_server) Failed to remove 1 bundle(s)", None),
        ("\t(2) raylet has lagging heartbeats due to slow network or busy workload.", None),
        ("preparing: 3/6 songs (1.2 a second)", "preparing: 3/6 songs (1.2 a second)"),
        ("(verse) not a process", "(verse) not a process"),
    ],
)
def test_people_see_the_runs_lines_and_not_rays(line: str, shown: str | None) -> None:
    assert Reader()(line) == shown


def test_the_traceback_that_ray_repeats_is_left_out_and_other_ranks_are_not() -> None:
    reader = Reader()
    lines = [
        "(RayTrainWorker pid=1) step 5",
        "(RayTrainWorker pid=1) Error in training function:",
        "(RayTrainWorker pid=1) Traceback (most recent call last):",
        '(RayTrainWorker pid=1)   File "worker.py", line 1, in <module>',
        "(RayTrainWorker pid=1) trainer.spec.errors.DataError: 歌がない",
        "(RayTrainWorker pid=2) step 6",
    ]
    assert [shown for line in lines if (shown := reader(line))] == ["step 5", "step 6"]

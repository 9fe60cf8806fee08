"""The metrics journal and the system metrics; no MLflow."""

import json
import math
import subprocess
import sys

import pytest

from trainer.spec.errors import StoreError
from trainer.store import open_store
from trainer.tracking import JOURNAL, Journal, SystemMetrics, read


@pytest.fixture
def run(tmp_path):
    return open_store(f"file://{tmp_path}/runs/さくら")


def steps(run):
    return [entry["step"] for entry in read(run)]


def test_the_store_has_every_entry_in_order_once_mirrored(run, tmp_path):
    journal = Journal(run, tmp_path / "journal")
    journal.record(1, {"train/loss": 2.5})
    journal.artifact(1, "audio/step-00000001/さくら.flac")
    journal.mirror.now()
    entries = list(read(run))
    assert [(e["step"], e.get("metrics"), e.get("artifact")) for e in entries] == [
        (1, {"train/loss": 2.5}, None),
        (1, None, "audio/step-00000001/さくら.flac"),
    ]
    journal.close(1, "FINISHED")
    assert list(read(run))[-1]["end"] == "FINISHED"


def test_values_that_are_not_finite_stay_strict_json_and_come_back(run, tmp_path):
    journal = Journal(run, tmp_path / "journal")
    journal.record(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    journal.close(1, "FAILED")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    first = json.loads(run.get(JOURNAL).splitlines()[0], parse_constant=refuse)
    a, b, c, d = (float(first["metrics"][key]) for key in "abcd")
    assert math.isnan(a)
    assert (b, c, d) == (math.inf, -math.inf, 1.0)


def test_resuming_keeps_what_the_commit_knew_and_drops_the_rest(run, tmp_path):
    first = Journal(run, tmp_path / "one")
    for step in range(1, 8):
        first.record(step, {"train/loss": 1 / step})
    first.close(7, "KILLED")

    second = Journal(run, tmp_path / "two", step=5)
    for step in (6, 7, 8):
        second.record(step, {"train/loss": 0.0})
    second.close(8, "FINISHED")
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert [entry["end"] for entry in read(run) if "end" in entry] == ["FINISHED"]


def test_a_run_that_never_committed_begins_its_journal_again(run, tmp_path):
    first = Journal(run, tmp_path / "one")
    first.record(0, {"validation/loss": 5.0})
    first.record(1, {"train/loss": 5.0})
    first.mirror.now()
    second = Journal(run, tmp_path / "two")
    second.record(0, {"validation/loss": 5.0})
    second.mirror.now()
    assert steps(run) == [0]
    first.close(1, "KILLED")
    second.close(0, "FINISHED")


def test_a_store_that_refuses_is_an_error_only_where_it_matters(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    journal = Journal(open_store(f"file://{tmp_path}/runs/x"), tmp_path / "journal")
    journal.record(1, {"train/loss": 1.0})
    with pytest.raises(StoreError):
        journal.mirror.now()
    journal.record(2, {"train/loss": 1.0})
    assert len((tmp_path / "journal").read_text().splitlines()) == 2
    with pytest.raises(StoreError):
        journal.close(2, "FAILED")


def test_system_metrics_are_finite_and_not_looked_at_twice_in_a_row():
    system = SystemMetrics(seconds=3600)
    first = system.sample()
    assert {"system/cpu_percent", "system/memory_gib"} <= first.keys()
    assert all(math.isfinite(value) for value in first.values())
    assert system.sample() == {}


def test_keeping_a_journal_imports_no_mlflow():
    code = "import sys, trainer.tracking as t; t.SystemMetrics().sample(); sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

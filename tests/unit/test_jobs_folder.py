"""The job files that ship with utaforge."""

import json
from pathlib import Path

import pytest

from trainer.spec import dump_job, job_from_json, job_schema, load_job

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_job_loads_and_points_editors_to_the_schema(path: Path) -> None:
    job = load_job(path, to_run=path.name == "demo.yaml")
    assert job_from_json(dump_job(job)) == job
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=job.schema.json\n")


def test_the_committed_schema_is_the_schema() -> None:
    committed = json.loads((JOBS / "job.schema.json").read_text(encoding="utf-8"))
    assert committed == job_schema(), "run: utaforge schema -o jobs/job.schema.json"

"""``jobs/songbloom_ja.yaml`` on a real cluster: as it is for the API server's eyes, and with tiny weights for real."""

import re
from concurrent.futures import Future

import pytest
import yaml

from tests.cluster.conftest import Said
from tests.kubernetes.place import Place
from tests.kubernetes.songbloom import JOB, NAME, STEPS, SUNG

pytestmark = pytest.mark.timeout(1800)


def test_the_api_server_accepts_what_a_dry_run_prints(place: Place) -> None:
    said = place.utaforge.output("submit", str(JOB), "--dry-run", "--set", f"cluster.namespace={place.namespace}")
    assert said.startswith("# plan of songbloom-ja\n")
    manifests = list(yaml.safe_load_all(said))
    assert [each["kind"] for each in manifests] == ["RayJob", "PodDisruptionBudget", "NetworkPolicy"]
    answers = place.team.namespace.apply(manifests, "--dry-run=server").splitlines()
    assert len(answers) == 3
    assert all(answer.endswith("serverside-applied (server dry run)") for answer in answers)


def test_with_tiny_weights_it_trains_without_a_laptop_and_loses_no_step_with_a_reclaimed_worker(
    place: Place, songbloom: Future[tuple[Said, Said]]
) -> None:
    left, followed = songbloom.result()
    assert left.code == 130
    assert f"run {NAME} goes on without you" in left.text
    for _, said_by_its_checkout in SUNG.values():
        assert said_by_its_checkout in followed.text
    noticed = re.search(r"taken away: stopped at step (\d+) with a checkpoint", followed.text)
    assert noticed
    assert f"going on from step {noticed[1]}\n" in followed.text
    log = place.run(NAME).store.get("logs/rank-0.log").decode()
    steps = re.findall(rf"step (\d+)/{STEPS} · loss", log)
    assert len(steps) == len(set(steps)) > 0
    assert "a rank was lost" not in followed.text
    assert f"run {NAME} is finished" in followed.text
    assert place.run(NAME).result is not None
    assert any(entry.path.startswith(f"audio/step-{STEPS:08d}/") for entry in place.run(NAME).store.list("audio"))

"""``jobs/songbloom_ja.yaml`` on a real cluster: as it is for the API server's eyes, and with tiny weights for real."""

import pytest
import yaml

from tests.kubernetes.images import ROOT
from tests.kubernetes.place import MOST_SECONDS, Place, as_options

pytestmark = pytest.mark.timeout(1800)
JOB = str(ROOT / "jobs" / "songbloom_ja.yaml")
NAME, STEPS = "songbloom-ja", 100
ROOMY = "cores: 0.15\nram_gib: 4\ndisk_gib: 4\n"
"""The head turns songs into sketches and latents, with networks of 2 GB."""


def test_the_api_server_accepts_what_a_dry_run_prints(place: Place) -> None:
    said = place.utaforge.output("submit", JOB, "--dry-run", "--set", f"cluster.namespace={place.namespace}")
    assert said.startswith("# plan of songbloom-ja\n")
    manifests = list(yaml.safe_load_all(said))
    assert [each["kind"] for each in manifests] == ["RayJob", "PodDisruptionBudget", "NetworkPolicy"]
    answers = place.team.namespace.apply(manifests, "--dry-run=server").splitlines()
    assert len(answers) == 3
    assert all(answer.endswith("serverside-applied (server dry run)") for answer in answers)


def test_with_tiny_weights_it_trains_without_a_laptop_and_survives_a_reclaimed_worker(place: Place) -> None:
    overrides = (
        f"store={place.store}",
        "model.pretrained=random:tiny",
        "model.codec={name: songbloom}",
        "model.segment_seconds=20",
        f"data.train=[{{dataset: {place.store}/datasets/songbloom}}]",
        "data.validation={fraction: 0.25, by: song}",
        "data.prepare={source: {type: demo, style: b, songs: 8}}",
        f"train.steps={STEPS}",
        "train.batch={seconds: 40}",
        "train.schedule.warmup=0",
        "checkpoint.every=5",
        f"validation.every={STEPS}",
        'validation.prompts=[{lyrics: "[verse] s a k u r a . y a y o i", seconds: 2, seed: 1}]',
        "tracking.experiment=さくら",
        "budget.hours=1",
        f"cluster.namespace={place.namespace}",
        f"cluster.image={place.image}",
        f"cluster.code={ROOT}",
        "cluster.profile=roomy",
        "cluster.workers=2",
        "cluster.spot=false",
    )
    (place.utaforge.folder / "profiles" / "roomy.yaml").write_text(ROOMY)
    (place.utaforge.folder / f"{NAME}.yaml").write_text((ROOT / JOB).read_text(encoding="utf-8"), encoding="utf-8")
    started = place.utaforge.start("submit", f"{NAME}.yaml", "--yes", *as_options(overrides))
    started.until(lambda: "step 1/" in started.text)
    left = started.interrupt()
    assert left.code == 130
    assert f"run {NAME} goes on without you" in left.text
    followed = place.follow(NAME)
    followed.until(lambda: place.committed(NAME))
    place.take_away(place.pods(NAME, "worker")[0])
    said = followed.end(MOST_SECONDS)
    assert said.code == 0, said.text
    assert "going on from step" in said.text
    assert place.run(NAME).result is not None
    assert any(entry.path.startswith(f"audio/step-{STEPS:08d}/") for entry in place.run(NAME).store.list("audio"))

"""``jobs/songbloom_ja.yaml`` with tiny weights, on the cluster."""

from collections.abc import Iterator

from tests.cluster.conftest import Said
from tests.kubernetes.images import ROOT
from tests.kubernetes.place import MOST_SECONDS, Place, as_options, changed_checkout, slow_steps

JOB = ROOT / "jobs" / "songbloom_ja.yaml"
NAME, STEPS = "songbloom-ja", 90
ROOMY = "cores: 0.05\nram_gib: 4\ndisk_gib: 4\n"
"""The head turns songs into sketches and latents, with networks of 2 GB."""


SUNG = {
    "driver/attempt.py": ("a machine is being taken away: ", "春の海: a machine is being taken away: "),
    "worker.py": ("going on from step", "花の雨: going on from step"),
}
"""Module of the trainer → what it says, and what it says in this job's checkout alone."""


UNHURRIED = slow_steps(0.5, until=50)
"""What gives the worker time to be taken away before all steps are made."""


def left_and_reclaimed(place: Place) -> tuple[Said, Said]:
    """Submit it, leave at its first step, and take a worker away with notice; what was said before Ctrl-C, and after.

    Its image comes from a registry that wants a login where there is one, its trainer from a checkout that was changed.
    """
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
        *_image(place),
        f"cluster.code={changed_checkout(place.utaforge.folder / 'sung', SUNG | UNHURRIED)}",
        "cluster.profile=roomy",
        "cluster.workers=2",
        "cluster.spot=false",
    )
    (place.utaforge.folder / "profiles" / "roomy.yaml").write_text(ROOMY)
    (place.utaforge.folder / f"{NAME}.yaml").write_text(JOB.read_text(encoding="utf-8"), encoding="utf-8")
    started = place.utaforge.start("submit", f"{NAME}.yaml", "--yes", *as_options(overrides))
    started.until(lambda: "step 1/" in started.text)
    left = started.interrupt()
    followed = place.follow(NAME)
    followed.until(lambda: place.committed(NAME))
    place.give_notice(place.pods(NAME, "worker")[0])
    return left, followed.end(MOST_SECONDS)


def _image(place: Place) -> Iterator[str]:
    registry = place.cluster.environment.get("UTAFORGE_TEST_PRIVATE_REGISTRY")
    if registry is None:
        yield f"cluster.image={place.image}"
        return
    login = [
        f"--docker-{key}={value}"
        for key, value in {
            "server": registry,
            "username": place.cluster.environment["UTAFORGE_TEST_REGISTRY_USER"],
            "password": place.cluster.environment["UTAFORGE_TEST_REGISTRY_PASSWORD"],
        }.items()
    ]
    place.team.namespace.kubectl("create", "secret", "docker-registry", "utaforge-registry", *login)
    yield f"cluster.image={registry}/{place.image.partition('/')[2]}"
    yield "cluster.pull_secrets=[utaforge-registry]"

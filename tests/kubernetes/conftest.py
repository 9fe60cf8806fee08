"""The cluster that all tests here use: one of their own, or with ``KUBECONFIG`` set, somebody's."""

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest

from launcher.runs import Run
from tests.cluster.conftest import Said
from tests.kubernetes.cluster.access import RAY_CRD, Cluster
from tests.kubernetes.cluster.control import KUBERNETES_PROGRAMS, environment, up, up_engine
from tests.kubernetes.cluster.install import Say, obstacles, programs
from tests.kubernetes.cluster.layout import Layout
from tests.kubernetes.images import Images
from tests.kubernetes.place import Place, a_place
from tests.kubernetes.schedule import Schedule, a_schedule
from tests.kubernetes.songbloom import left_and_reclaimed
from tests.kubernetes.story import Story, told_to_its_end, told_until_held
from tests.kubernetes.team import Team, a_team

T = TypeVar("T")
BESIDE = {"test_retraining": "retraining", "test_songbloom": "songbloom", "test_story": "held"}
"""Modules whose tests ask what has come of a fixture that works beside other tests."""
WITHOUT_KUBERNETES = ["test_services", "test_images"]
"""Docker's engine is enough for them, so the story goes on to its end beside them, in which programs are killed."""
ORDER = ["test_placement", "test_manifests", "test_cluster", "test_mlflow", "test_why", "test_submit",
         "test_retraining", "test_songbloom", *WITHOUT_KUBERNETES, "test_story"]  # fmt: skip
FIRST_BESIDE = "test_manifests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pods go to simulated nodes while there are such, and nothing but the story stands it that programs are killed.

    Between the two, what takes long and waits for most of that time goes on beside everything else. Images are built
    while Kubernetes comes up, this machine trains and tests go on that do without.
    """
    items.sort(key=lambda item: [*ORDER, item.path.stem].index(item.path.stem))
    functions = [item for item in items if isinstance(item, pytest.Function)]
    used = {fixture for item in functions for fixture in item.fixturenames}
    if _somebodys():
        used -= {"held", "told"}
    if "building" in used:
        functions[0].fixturenames.insert(0, "building")
    if "here" in used:
        functions[0].fixturenames.append("here")
    stems = [item.path.stem for item in functions]
    if FIRST_BESIDE in stems:
        functions[stems.index(FIRST_BESIDE)].fixturenames.extend(name for name in BESIDE.values() if name in used)
    if WITHOUT_KUBERNETES[0] in stems and "told" in used:
        functions[stems.index(WITHOUT_KUBERNETES[0])].fixturenames.insert(0, "told")


def _somebodys() -> bool:
    own = str(Layout.of_environment().kubeconfig)
    return os.environ.get("KUBECONFIG", own) != own


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Tells who watches what goes on, although tests' output is kept from them."""
    capture = pytestconfig.pluginmanager.get_plugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            print(text, flush=True)

    return line


@pytest.fixture(scope="session")
def engine(say: Say) -> Iterator[Cluster]:
    """The cluster as soon as images can be built and pushed: from nothing, Kubernetes takes minutes more."""
    if _somebodys():
        found = Cluster(os.environ, own=False)
        if RAY_CRD not in found.kubectl("get", "crd", "-o", "name"):
            pytest.skip("the cluster of KUBECONFIG has no KubeRay")
        yield found
        return
    if reasons := obstacles():
        because = f"no cluster can be brought up here: {'; '.join(reasons)}"
        pytest.fail(because) if os.environ.get("CI") else pytest.skip(because)
    layout = Layout.of_environment()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(programs, KUBERNETES_PROGRAMS, say, niceness=19)  # for ``up``, which asks again
        up_engine(layout, say)
        yield Cluster(os.environ | environment(layout), own=True)


@pytest.fixture(scope="session")
def cluster(engine: Cluster, say: Say) -> Cluster:
    if engine.own:
        up(Layout.of_environment(), say)
    return engine


@pytest.fixture
def own_cluster(cluster: Cluster) -> Cluster:
    if not cluster.own:
        pytest.skip("this changes nodes or programs: only for the tests' own cluster")
    return cluster


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh one for each module of tests."""
    name = f"utaforge-test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def building(engine: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The product's images, of the last commit: known by their names, and built beside what goes on."""
    return Images(engine, tmp_path_factory.mktemp("images") / "utaforge")


@pytest.fixture(scope="session")
def images(building: Images) -> Images:
    """Once they are built and pushed."""
    building.wait()
    return building


@pytest.fixture(scope="session")
def stand_ins(engine: Cluster, request: pytest.FixtureRequest) -> dict[str, str]:
    """Public images → what takes their places in a registry of the tests'; nothing does where there is none."""
    return request.getfixturevalue("building").stand_ins if "UTAFORGE_TEST_REGISTRY" in engine.environment else {}


@pytest.fixture(scope="session")
def team(cluster: Cluster, stand_ins: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with a_team(cluster, stand_ins, tmp_path_factory.mktemp("team")) as made:
        yield made


@pytest.fixture(scope="session")
def opening(team: Team, building: Images) -> Iterator[Future[None]]:
    """Until pods can pull what they run, and reach MLflow."""

    def opened() -> None:
        building.wait()
        team.bring_up_mlflow()

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(opened)


@pytest.fixture(scope="session")
def opened(opening: Future[None]) -> None:
    """Runs can be sent."""
    opening.result()


@pytest.fixture(scope="session")
def place(team: Team, building: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where the team's runs are submitted to; they can begin once it is ``opened``."""
    with a_place(team, building.name("trainer"), tmp_path_factory.mktemp("uta")) as made:
        yield made


@contextmanager
def _after(awaited: Future[Any], work: Callable[[], T]) -> Iterator[Future[T]]:
    """What comes of ``work``, which begins beside the tests once ``awaited`` is there."""

    def done() -> T:
        awaited.result()
        return work()

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(done)


@pytest.fixture(scope="session")
def retraining(
    place: Place, building: Images, opening: Future[None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Schedule]]:
    """What a CronJob does, once it has done all."""
    with _after(opening, a_schedule(place, building, tmp_path_factory.mktemp("毎週")).tell) as told:
        yield told


@pytest.fixture(scope="session")
def songbloom(place: Place, opening: Future[None]) -> Iterator[Future[tuple[Said, Said]]]:
    """What ``left_and_reclaimed`` gives."""
    with _after(opening, lambda: left_and_reclaimed(place)) as told:
        yield told


@pytest.fixture(scope="session")
def here(place: Place, building: Images) -> Iterator[Future[Run]]:
    """The demo with the local backend, once it keeps no image waiting."""
    with _after(building.packages, lambda: place.here("demo")) as trained:
        yield trained


@pytest.fixture(scope="session")
def held(place: Place, cluster: Cluster, songbloom: Future[tuple[Said, Said]]) -> Iterator[Future[Story]]:
    """The story until it is held, told once the node's memory has room for it."""
    if not cluster.own:
        pytest.skip("the story ends programs of the cluster: only for the tests' own")
    with _after(songbloom, lambda: told_until_held(place)) as told:
        yield told


@pytest.fixture(scope="session")
def told(held: Future[Story]) -> Iterator[Future[str]]:
    """The story to its end; nothing else may need the cluster while it is told."""
    with _after(held, lambda: told_to_its_end(held.result())) as said:
        yield said

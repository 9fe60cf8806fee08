"""The demo once more, which loses a worker, its memory and its head, and goes on each time.

Then it is held until nobody else needs the cluster, whose programs are killed.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kubernetes.cluster.control import kill, up
from tests.kubernetes.cluster.layout import Layout
from tests.kubernetes.place import MOST_SECONDS, Place, changed_checkout, slow_steps
from tests.kubernetes.situations import cause_of

STORY = "sakura"
SLOW = slow_steps(3, until=24)
"""The last ones are not, when all has happened."""
EAT = """
import glob, os, pathlib, time
for _ in range(3):
    os.fork()
songs = []
while any("ray::RayTrain" in pathlib.Path(name).read_text() for name in glob.glob("/proc/[0-9]*/comm")):
    songs.append(b"u" * (2 << 20))
    time.sleep(0.2)
"""
"""Eight processes that take all memory of a pod until its rank is gone, which Ray has marked to go first.

Slowly: Ray looks four times a second, and tells of what it has ended itself, not of what the kernel has.
"""
SIGNAL = """
import glob, os, pathlib, sys
for name in glob.glob("/proc/[0-9]*/comm"):
    if "ray::RayTrain" in pathlib.Path(name).read_text():
        os.kill(int(name.split("/")[2]), int(sys.argv[1]))
"""
OUTAGE_SECONDS = 30.0
CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "ray-operator")
"""What goes with its machine. Were only the API server gone, the others would look for it ever less often."""
HANG_SECONDS = 15.0
"""Of silence that ``why`` takes for a hang here."""


class Story:
    """The run while it is followed from a laptop."""

    def __init__(self, place: Place) -> None:
        self.place, self.namespace = place, place.team.namespace
        slow = changed_checkout(place.utaforge.folder / "slow", SLOW)
        self.submission = place.submit(STORY, f"cluster.code={slow}")
        self.learns()

    @property
    def resumed(self) -> int:
        """How often ranks have gone on from a checkpoint."""
        return self.submission.text.count("going on from step ")

    def learns(self) -> None:
        """Wait until there is a checkpoint that was not there before."""
        before = self.place.committed(STORY)
        self.submission.until(lambda: self.place.committed(STORY) > before)

    def goes_on(self, before: int) -> None:
        """Wait until ranks have gone on once more than ``before``, and have learnt something."""
        self.submission.until(lambda: self.resumed > before)
        self.learns()

    def signal_ranks(self, number: signal.Signals) -> None:
        """Stop them where they are, or let them go on."""
        for pod in self.place.pods(STORY, "worker"):
            self.namespace.kubectl("exec", pod, "--", "python", "-c", SIGNAL, str(number.value))


def told_until_held(place: Place) -> Story:
    """The story until its ranks are held on its second cluster; each loss is explained when it happens."""
    told = Story(place)

    told.namespace.kubectl("scale", "deployment/mlflow", "--replicas=0")
    before = told.resumed
    place.take_away(place.pods(STORY, "worker")[0])
    assert "-worker-" in cause_of(place.run(STORY), "a worker was taken away", among=None).evidence
    told.goes_on(before)
    told.namespace.kubectl("scale", "deployment/mlflow", "--replicas=1")

    before = told.resumed
    told.namespace.kubectl("exec", place.pods(STORY, "worker")[0], "--", "python", "-c", EAT, check=False)
    assert "ram_gib" in cause_of(place.run(STORY), "ran out of memory", among=None).cure
    told.goes_on(before)

    told.signal_ranks(signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.why.QUIET_SECONDS", HANG_SECONDS)
        assert "rank-" in cause_of(place.run(STORY), "it hangs", among=None).evidence

    before = told.resumed  # of ranks that are not stopped some would end the run before they miss their head
    place.take_away(place.pods(STORY, "head")[0])
    assert "KubeRay makes the next one" in cause_of(place.run(STORY), "clusters were lost", among=None).cure
    told.goes_on(before)

    told.signal_ranks(signal.SIGSTOP)
    return told


def told_to_its_end(held: Story) -> str:
    """What the launcher said of a story that was held, which also outlives an outage of nearly everything."""
    held.signal_ranks(signal.SIGCONT)
    with without(*CONTROL_PLANE, "versitygw"):
        time.sleep(OUTAGE_SECONDS)

    said = held.submission.end(MOST_SECONDS)
    assert said.code == 0, said.text
    return said.text


@contextmanager
def without(*programs: str) -> Iterator[None]:
    """``kill -9`` of some of the cluster's programs; afterwards they are started again."""
    layout = Layout.of_environment()
    for program in programs:
        kill(layout, program)
    try:
        yield
    finally:
        up(layout, print)

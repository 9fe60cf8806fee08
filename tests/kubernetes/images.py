"""The product's images, built by ``make image`` and pushed to the cluster's registry."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.control import DOCKER

ROOT = Path(__file__).parents[2]
DOCKERFILES = Path(__file__).parent / "dockerfiles"
TAG = "test"
CONFINED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")


class Images:
    """``make image`` in a clone of the last commit, begun at once, and the engine that holds what it builds."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.folder = folder
        self.registry = cluster.registry
        self.environment = dict(cluster.environment)
        self.run("git", "clone", "--quiet", ROOT, folder)
        self.commit = self.run("git", "-C", folder, "rev-parse", "HEAD").strip()
        self._building = ThreadPoolExecutor(1).submit(self.build, TAG)

    def wait(self) -> None:
        """Until both are built and pushed; fails as ``build`` does."""
        self._building.result()

    def build(self, tag: str) -> None:
        """Build and push both."""
        self.run(
            *("make", "--directory", self.folder, "image", f"TAG={tag}", f"REGISTRY={self.registry}", "PUSH=1"),
            *("BUILD=--network host", "SOURCE=https://example.org/歌", f"UTAFORGE_HOME={self.folder}/.utaforge"),
        )

    def name(self, image: str, tag: str = TAG) -> str:
        """Of ``trainer`` or ``launcher``, as pods pull it."""
        return f"{self.registry}/utaforge-{image}:{tag}"

    def inspect(self, image: str, tag: str = TAG) -> Any:
        """What the engine knows of it."""
        return json.loads(self.run("docker", "image", "inspect", self.name(image, tag)))[0]

    def inside(self, image: str, *command: str, stdin: str = "") -> str:
        """What a command prints in a container without rights, network or a place to write to but ``/tmp``."""
        return self.run("docker", "run", "--rm", "--interactive", *CONFINED, self.name(image), *command, stdin=stdin)

    def found(self, image: str, *programs: str) -> set[str]:
        """Those of ``programs`` that are on its path."""
        script = "import shutil, sys; print(*filter(shutil.which, sys.argv[1:]))"
        return set(self.inside(image, "python", "-c", script, *programs).split())

    def run(self, *command: str | Path, stdin: str = "") -> str:
        """What a program prints that succeeds."""
        done = subprocess.run(
            command, env=self.environment, input=stdin, capture_output=True, text=True, timeout=3000, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


def stand_in(cluster: Cluster, name: str, context: Path = DOCKERFILES) -> str:
    """What takes a public image's place where nothing can be pulled; built, pushed, and named as pods pull it."""
    image = f"{cluster.registry}/utaforge-test-{name}:latest"
    file, base = f"--file={DOCKERFILES / name}.Dockerfile", f"--build-arg=BASE={cluster.image}"
    environment = {**cluster.environment, "DOCKER_BUILDKIT": "1"}
    for command in (["build", "--network=host", base, file, f"--tag={image}", str(context)], ["push", image]):
        done = subprocess.run([DOCKER, *command], env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return image

"""The product's images, as ``make image`` builds and pushes them, and what stands in for public ones."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.layers import store_layers
from tests.kubernetes.cluster.layout import DOCKER, Layout

ROOT = Path(__file__).parents[2]
DOCKERFILES = Path(__file__).parent / "dockerfiles"
TAG = "test"
BUILD = "--network=host"
CONFINED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")


class Images:
    """``make image`` in a clone of the last commit, begun at once, and the engine that holds what it builds.

    Attributes:
        commit: the last one.
        stand_ins: a public image of the manifests → what takes its place where nothing can be pulled.
        packages: once it is built, the image that has the trainer's packages alone. All others wait for it.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.folder = folder
        self.registry, self.base, self.own = cluster.registry, cluster.image, cluster.own
        self.environment = {**cluster.environment, "DOCKER_BUILDKIT": "1"}
        self.run("git", "clone", "--quiet", ROOT, folder)
        self.commit = self.run("git", "-C", folder, "rev-parse", "HEAD").strip()
        self.stand_ins = {
            "ghcr.io/mlflow/mlflow": self._name_of_stand_in("mlflow"),
            "postgres": self._name_of_stand_in("postgresql"),
        }
        pool = ThreadPoolExecutor(2)
        self.packages = pool.submit(self._build_packages)
        self._building = pool.submit(self._build_all)

    def wait(self) -> None:
        """Until all are built and pushed; fails as ``build`` does."""
        self._building.result()

    def _build_packages(self) -> str:
        image = self.name("trainer", "packages")
        self._build_target("trainer-packages", f"--tag={image}")
        return image

    def _build_all(self) -> None:
        """The packages' layer of 5 GB is in the registry before anything is pushed that has it."""
        packages = self.packages.result()
        with ThreadPoolExecutor() as pool:
            postgresql = pool.submit(self.stand_in, "postgresql")
            trainer = pool.submit(self._build_target, "trainer")
            if self.own:
                store_layers(Layout.of_environment(), packages)
            trainer.result()
            self.build(TAG)
            self.stand_in("mlflow")
            postgresql.result()

    def _build_target(self, target: str, *options: str) -> None:
        dockerfile = f"--file={self.folder}/docker/Dockerfile"
        self.run("docker", "build", BUILD, f"--target={target}", dockerfile, *options, self.folder)

    def build(self, tag: str) -> None:
        """Build and push both."""
        self.run(
            *("make", "--directory", self.folder, "image", f"TAG={tag}", f"REGISTRY={self.registry}", "PUSH=1"),
            *(f"BUILD={BUILD}", "SOURCE=https://example.org/歌", f"UTAFORGE_HOME={self.folder}/.utaforge"),
        )

    def stand_in(self, name: str, context: Path = DOCKERFILES) -> str:
        """Build and push it; its name as pods pull it."""
        image = self._name_of_stand_in(name)
        arguments = (f"--build-arg=BASE={self.base}", f"--build-arg=TRAINER={self.name('trainer')}")
        file = f"--file={DOCKERFILES / name}.Dockerfile"
        self.run(DOCKER, "build", BUILD, *arguments, file, f"--tag={image}", context)
        self.run(DOCKER, "push", image)
        return image

    def _name_of_stand_in(self, name: str) -> str:
        return f"{self.registry}/utaforge-test-{name}:latest"

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

"""Where a cluster has its files, and which names and addresses are its own."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.spec.errors import ClusterError

ROOT = Path(__file__).parents[3]
DOCKER = "/usr/bin/docker"
"""Debian's: it builds without plug-ins, which other clients on the path may not."""
LONGEST_FOLDER = 60
"""In bytes: the path of a Unix socket may have 107."""


@dataclass(frozen=True)
class Layout:
    """One cluster, known by its folder. Clusters of two folders run beside each other."""

    folder: Path

    @classmethod
    def of_environment(cls) -> "Layout":
        """The folder of ``UTAFORGE_CLUSTER_DIR``, or ``.utaforge/kubernetes`` of this checkout."""
        folder = Path(os.environ.get("UTAFORGE_CLUSTER_DIR") or ROOT / ".utaforge" / "kubernetes").absolute()
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise ClusterError(f"{folder} is too long for a socket's path", "name a shorter one: UTAFORGE_CLUSTER_DIR")
        return cls(folder)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(os.fsencode(self.folder)).hexdigest()

    @cached_property
    def name(self) -> str:
        """Of the control group that all its processes are in."""
        return f"utaforge-{self._digest[:6]}"

    @property
    def device(self) -> str:
        """The network device on this machine that leads to the cluster."""
        return f"uta-{self._digest[:6]}"

    def address(self, host: int) -> str:
        """An address on the bridge; 1 is the node's, with all its servers, 2 is this machine's, 16 and up are pods'."""
        return f"10.187.{int(self._digest[:4], 16) % 254 + 1}.{host}"

    @property
    def node(self) -> str:
        """The node's address."""
        return self.address(1)

    @property
    def subnet(self) -> str:
        """Of the bridge and of all pods."""
        return f"{self.address(0)}/24"

    @property
    def services(self) -> str:
        """Addresses of services, which work inside the cluster only."""
        return self.subnet.replace("10.187.", "10.188.")

    @property
    def api_service(self) -> str:
        """The API server's address as pods know it."""
        return self.address(1).replace("10.187.", "10.188.")

    @property
    def registry(self) -> str:
        """Host and port before the names of images, for ``docker push`` and for pods alike."""
        return f"{self.node}:5000"

    @property
    def private_registry(self) -> str:
        """The same images, behind a user and a password."""
        return f"{self.node}:5001"

    @property
    def s3(self) -> str:
        """URL of the S3 server, for this machine and for pods alike."""
        return f"http://{self.node}:7070"

    @property
    def api(self) -> str:
        """URL of the API server."""
        return f"https://{self.node}:6443"

    @property
    def programs(self) -> Path:
        """Links to the programs that are built, to ``docker`` and to KubeRay's manifests."""
        return self.folder / "bin"

    @property
    def state(self) -> Path:
        """What one cluster knows; goes with it."""
        return self.folder / "state"

    @property
    def images(self) -> Path:
        """Of Docker, the registry and the node: stay for the next cluster, for they take minutes to make and pull."""
        return self.folder / "images"

    @property
    def kubeconfig(self) -> Path:
        """Of the administrator."""
        return self.folder / "kubeconfig"

    @property
    def docker(self) -> str:
        """``DOCKER_HOST`` of this cluster's engine."""
        return f"unix://{self.folder}/docker.sock"

    @property
    def docker_config(self) -> Path:
        """``DOCKER_CONFIG``: its plug-ins, and nobody's logins."""
        return self.folder / "docker-config"

    @property
    def containerd(self) -> Path:
        """Socket of the container runtime."""
        return self.folder / "containerd.sock"

"""A cluster as tests see it: this package's own, or any that people have (kind, k3s, GKE, …)."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

RAY_CRD = "rayjobs.ray.io"


@dataclass(frozen=True)
class Cluster:
    """What the environment says about a cluster.

    Args:
        environment: variables for programs that use it: ``KUBECONFIG``, ``PATH`` with ``kubectl``, and where there are
            such things ``DOCKER_HOST``, ``UTAFORGE_TEST_REGISTRY``, ``UTAFORGE_TEST_S3``, ``UTAFORGE_TEST_IMAGE``
            and S3's keys in ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``.
        own: whether this package's; else nodes and programs are not to be touched.
    """

    environment: Mapping[str, str]
    own: bool

    @property
    def kubeconfig(self) -> str:
        """Path of the administrator's kubeconfig."""
        return self.environment["KUBECONFIG"]

    @property
    def registry(self) -> str:
        """What comes before the names of images that tests push, for this machine and for pods."""
        return self._variable("UTAFORGE_TEST_REGISTRY", "a registry that this machine and the nodes reach")

    @property
    def s3(self) -> str:
        """URL of an S3 server that this machine and pods reach."""
        return self._variable("UTAFORGE_TEST_S3", "the URL of an S3 server that this machine and pods reach")

    @property
    def image(self) -> str:
        """A plain Debian with bash."""
        return self.environment.get("UTAFORGE_TEST_IMAGE", "debian:bookworm-slim")

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What ``kubectl`` prints; with ``check``, fails with what it said if it could not do it."""
        done = subprocess.run(
            ["kubectl", *arguments],
            env=dict(self.environment),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}:\n{done.stdout}"
        return done.stdout

    def apply(self, *manifests: Mapping[str, Any]) -> None:
        """Create or change objects."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))

    def get(self, *arguments: str) -> Any:
        """Objects as the API server has them."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def _variable(self, name: str, what: str) -> str:
        if name not in self.environment:
            pytest.skip(f"set {name} to {what}")
        return self.environment[name]

"""The manifests of ``k8s/`` as tests want them: in a namespace of its own, with images that can be pulled."""

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.cluster.access import Cluster

K8S = Path(__file__).parents[2] / "k8s"
Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Namespace:
    """A namespace that a kustomization of ``k8s/`` makes, with everything that goes with it."""

    cluster: Cluster
    name: str = field(default_factory=lambda: f"utaforge-test-{secrets.token_hex(4)}")

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What ``kubectl`` prints, in this namespace."""
        return self.cluster.kubectl(f"--namespace={self.name}", *arguments, stdin=stdin, check=check)

    def apply(self, objects: Sequence[Mapping[str, Any]], *options: str, check: bool = True) -> str:
        """Create or change objects, on the server and strictly."""
        manifest = yaml.safe_dump_all(objects)
        return self.kubectl(
            "apply", "--server-side", "--validate=strict", "-f", "-", *options, stdin=manifest, check=check
        )

    def get(self, *arguments: str) -> Any:
        """Objects as the API server has them."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def render(
        self,
        folder: str,
        scratch: Path,
        images: Mapping[str, str] | None = None,
        mlflow: Mapping[str, str] | None = None,
    ) -> Objects:
        """The objects of a kustomization, changed as people change them: by one on top of it.

        Args:
            folder: below ``k8s/``.
            scratch: an empty folder.
            images: name of a default image → what to pull instead, ``NAME:TAG``.
            mlflow: settings of the server, which then runs: with requests that leave room for runs beside it.
        """
        rename = f"- {{op: replace, path: /metadata/name, value: {self.name}}}"
        top: dict[str, Any] = {
            "namespace": self.name,
            "resources": [os.path.relpath(K8S / folder, scratch.resolve())],
            "images": [_replaced(old, new) for old, new in (images or {}).items()],
            "patches": [
                {
                    "target": {"kind": "ClusterRole|ClusterRoleBinding"},
                    "options": {"allowNameChange": True},
                    "patch": rename,
                },
            ],
        }
        if mlflow:
            requests = "/spec/template/spec/containers/0/resources/requests"
            small = f"- {{op: replace, path: {requests}, value: {{cpu: 100m, memory: 512Mi}}}}"
            top["patches"].append({"target": {"kind": "Deployment|StatefulSet"}, "patch": small})
            literals = [f"{name}={value}" for name, value in mlflow.items()]
            top["configMapGenerator"] = [{"name": "mlflow", "behavior": "merge", "literals": literals}]
        (scratch / "kustomization.yaml").write_text(yaml.safe_dump(top), encoding="utf-8")
        return list(yaml.safe_load_all(kustomize(scratch)))

    @contextlib.contextmanager
    def holding(self, objects: Objects) -> Iterator[None]:
        """It exists inside, with the cluster-wide ones of its objects; the others are for the caller to apply."""
        whole = of_kind(objects, "Namespace", "ClusterRole", "ClusterRoleBinding")
        try:
            self.apply(whole)
            yield
        finally:
            self.kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(whole))


def kustomize(folder: Path) -> str:
    """What ``kubectl kustomize`` makes of a folder; no cluster is asked."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(objects: Objects, *kinds: str) -> Objects:
    """The objects of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


def _replaced(old: str, new: str) -> dict[str, str]:
    name, tag = new.rsplit(":", 1)
    return {"name": old, "newName": name, "newTag": tag}

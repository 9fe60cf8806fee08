"""Disks for PersistentVolumeClaims: folders of this machine, which unlike ``hostPath`` heed a pod's ``fsGroup``."""

import json
import shutil
from collections.abc import Callable
from typing import Any

from .configuration import NODE
from .layout import Layout

VOLUMES = 8
CLASS = "standard"


def renew(layout: Layout, kubectl: Callable[..., str]) -> None:
    """Make the default storage class and its volumes; those that somebody has given back are emptied."""
    held = json.loads(kubectl("get", "pv", "-o", "json"))["items"]
    used = {volume["metadata"]["name"] for volume in held if volume["status"]["phase"] in ("Bound", "Available")}
    released = [volume["metadata"]["name"] for volume in held if volume["status"]["phase"] == "Released"]
    if released:
        kubectl("delete", "pv", *released)
    missing = [f"volume-{number}" for number in range(VOLUMES) if f"volume-{number}" not in used]
    if not missing:
        return
    for name in missing:
        shutil.rmtree(layout.state / "volumes" / name, ignore_errors=True)
        (layout.state / "volumes" / name).mkdir(parents=True)
    objects = [_storage_class(), *(_volume(name, layout) for name in missing)]
    path = layout.state / "volumes.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    kubectl("apply", "-f", str(path))


def _storage_class() -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }


def _volume(name: str, layout: Layout) -> dict[str, Any]:
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": CLASS,
            "local": {"path": str(layout.state / "volumes" / name)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }

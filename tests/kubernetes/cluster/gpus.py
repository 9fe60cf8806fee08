"""GPUs that are only said to be there: enough to see where the scheduler puts a pod."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from .access import Cluster
from .configuration import NODE

GPU = "nvidia.com/gpu"
GKE_SPOT = "cloud.google.com/gke-spot"
_GKE_T4 = {"cloud.google.com/gke-accelerator": "nvidia-tesla-t4", "cloud.google.com/gke-accelerator-count": "4"}
NODES: dict[str, tuple[int, str, dict[str, str]]] = {
    "gke-t4x4": (4, "present", _GKE_T4),
    "gke-t4x4-spot": (4, "present", _GKE_T4 | {GKE_SPOT: "true"}),
    "gke-a100-80": (1, "present", {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}),
    "eks-a100-40-spot": (
        8,
        "true",
        {
            "karpenter.k8s.aws/instance-gpu-name": "a100",
            "karpenter.k8s.aws/instance-gpu-memory": "40960",
            "karpenter.sh/capacity-type": "spot",
            "node.kubernetes.io/instance-type": "p4d.24xlarge",
        },
    ),
    "onprem-rtx4090": (
        1,
        "present",
        {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090", "nvidia.com/gpu.memory": "24564"},
    ),
}
"""Simulated nodes: GPUs, value of the taint ``nvidia.com/gpu`` and labels, as GKE, EKS with Karpenter and NVIDIA's GPU
operator set them. On premises nodes often have no taint; here it keeps pods of other tests away."""
PLAIN = "plain"
"""A simulated node without GPUs, which pods of all tests may go to."""


@contextlib.contextmanager
def simulated_nodes(cluster: Cluster, *, plain: bool = False) -> Iterator[None]:
    """The nodes of ``NODES``, with ``plain`` also ``PLAIN``: pods on them are told to run, and nothing runs."""
    nodes = {name: _node(name, *about) for name, about in NODES.items()}
    if plain:
        nodes[PLAIN] = _node(PLAIN, 0, "", {})
    cluster.apply(*nodes.values())
    try:
        cluster.kubectl("wait", "--for=condition=Ready", *(f"node/{name}" for name in nodes), "--timeout=60s")
        yield
    finally:
        cluster.kubectl("delete", "node", "--ignore-not-found", *nodes)


@contextlib.contextmanager
def gpus_on_the_node(cluster: Cluster, count: int) -> Iterator[None]:
    """``count`` GPUs on the node where pods really run; containers find no device there."""
    _patch(cluster, [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}])
    try:
        yield
    finally:
        _patch(cluster, [{"op": "remove", "path": "/status/capacity/nvidia.com~1gpu"}])


def _patch(cluster: Cluster, changes: list[dict[str, str]]) -> None:
    cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=json", "-p", json.dumps(changes))


def _node(name: str, gpus: int, taint: str, labels: dict[str, str]) -> dict[str, Any]:
    resources = {"cpu": "96", "memory": "1000Gi", "ephemeral-storage": "1000Gi", "pods": "110"}
    resources |= {GPU: str(gpus)} if gpus else {}
    taints = {GPU: taint} if gpus else {}
    taints |= {GKE_SPOT: labels[GKE_SPOT]} if GKE_SPOT in labels else {}
    own = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": {"kwok.x-k8s.io/node": "fake"}, "labels": own | labels},
        "spec": {"taints": [{"key": key, "value": value, "effect": "NoSchedule"} for key, value in taints.items()]},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated"}],  # kwok says it 20 s later
        },
    }

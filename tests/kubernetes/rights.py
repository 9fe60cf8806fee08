"""What the launcher may do in a cluster, and what it does there."""

import re
from collections.abc import Iterable

Right = tuple[str, str, str]
"""Resource, name (none: all) and verbs, as ``kubectl auth can-i --list`` has them."""
RIGHTS: set[Right] = {
    ("rayjobs.ray.io", "", "create delete get list"),
    ("rayclusters.ray.io", "", "list"),
    ("poddisruptionbudgets.policy", "", "create"),
    ("networkpolicies.networking.k8s.io", "", "create"),
    ("pods", "", "list"),
    ("pods/log", "", "get"),
    ("events", "", "list"),
    ("resourcequotas", "", "list"),
    ("secrets", "utaforge-mlflow", "get"),
    ("secrets", "utaforge-registry", "get"),
    ("secrets", "utaforge-store", "get"),
    ("serviceaccounts", "utaforge-trainer", "get"),
    ("nodes", "", "list"),
    ("nodepools.karpenter.sh", "", "list"),
}
"""The role in ``k8s/base/access.yaml``."""
BY_NAME = ("secrets", "serviceaccounts")
EVERYBODYS = ("selfsubjectaccessreviews.authorization.k8s.io",)
_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[\w.-]+)/\w+)(?:/namespaces/[\w-]+)?/(?P<kind>\w+)(?:/(?P<name>[\w.-]+))?(?P<part>/\w+)?(?:\?|$)"
)


def rights_used(asked: Iterable[tuple[str, str]]) -> set[Right]:
    """The rights that requests need, each a method and a path with its query."""
    verbs: dict[tuple[str, str], set[str]] = {}
    for method, path in asked:
        if found := _PATH.match(path):
            kind = f"{found['kind']}{found['part'] or ''}{'.' + found['group'] if found['group'] else ''}"
            name = found["name"] or ""
            verb = {"POST": "create", "DELETE": "delete"}.get(method) or ("get" if name else "list")
            if kind not in EVERYBODYS:
                verbs.setdefault((kind, name if kind in BY_NAME else ""), set()).add(verb)
    return {(kind, name, " ".join(sorted(used))) for (kind, name), used in verbs.items()}

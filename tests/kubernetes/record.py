"""``python -m tests.kubernetes.record STORE RUN NAME``: a run on a real cluster, as ``tests/unit/launcher`` reads it.

Writes ``tests/unit/launcher/snapshots/NAME.json``: what ``why`` gathers, without what it never reads and without the
addresses of the machine.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from launcher.runs import find_run
from launcher.snapshot import gather

SNAPSHOTS = Path(__file__).parents[1] / "unit" / "launcher" / "snapshots"
KEPT: dict[str, tuple[str, ...]] = {
    "clusters": ("status.conditions",),
    "pods": ("metadata.name", "metadata.labels", "metadata.deletionTimestamp", "spec.affinity", "spec.tolerations",
             "status.phase", "status.reason", "status.message", "status.conditions", "status.initContainerStatuses",
             "status.containerStatuses"),
    "events": ("metadata.creationTimestamp", "type", "reason", "message", "involvedObject.kind", "involvedObject.name",
               "lastTimestamp", "eventTime"),
    "quotas": ("metadata.name", "status"),
    "nodes": ("metadata", "spec"),
    "rayjob": ("metadata.name", "metadata.creationTimestamp", "metadata.labels", "metadata.annotations", "spec.suspend",
               "spec.backoffLimit", "status"),
}  # fmt: skip
ADDRESSES = ((r"10\.\d+\.\d+\.\d+:5000", "registry.example"), (r"10\.\d+\.\d+\.\d+:5001", "private.example"),
             (r"10\.\d+\.\d+\.\d+", "192.0.2.1"))  # fmt: skip


def main(store: str, run: str, name: str) -> None:
    """Gather and write."""
    told = gather(find_run(store, run)).as_json()
    told["attempt"] = told["attempt"] and {**told["attempt"], "host": "歌のホスト", "user": "歌"}
    if objects := told["objects"]:
        for kind, paths in KEPT.items():
            held = objects[kind]
            objects[kind] = (
                [_only(each, paths) for each in held] if isinstance(held, list) else held and _only(held, paths)
            )
    text = json.dumps(told, ensure_ascii=False, indent=1)
    for pattern, instead in ADDRESSES:
        text = re.sub(pattern, instead, text)
    SNAPSHOTS.mkdir(exist_ok=True)
    (SNAPSHOTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _only(thing: dict[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for path in paths:
        value: Any = thing
        for key in path.split("."):
            value = value.get(key) if value else None
        if value is not None:
            *above, last = path.split(".")
            place = kept
            for key in above:
                place = place.setdefault(key, {})
            place[last] = value
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How two jobs differ, field by field."""

import json
from collections.abc import Iterator, Sequence
from typing import cast

from trainer.spec import Job, dump_job

_MAY_DIFFER = (("cluster",), ("tracking",), ("checkpoint", "every"), ("budget",), ("retrain",))
"""What a run may change when it is continued: nothing that is learnt depends on it."""


def differences(old: Job, new: Job) -> list[str]:
    """The changes that decide what is learnt."""
    return list(changes(old, new, _MAY_DIFFER))


def changes(old: Job, new: Job, without: Sequence[tuple[str, ...]] = ()) -> Iterator[str]:
    """``path: old → new`` for every field that differs, but those below a path of ``without``."""
    before, after = (dict(_flat(json.loads(dump_job(job)))) for job in (old, new))
    for path in before | after:
        if before.get(path) != after.get(path) and not any(path[: len(free)] == free for free in without):
            yield f"{'.'.join(path)}: {_shown(before.get(path))} → {_shown(after.get(path))}"


def _flat(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict) and value:
        for key, inner in cast("dict[str, object]", value).items():
            yield from _flat(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(cast("list[object]", value)):
            yield from _flat(inner, (*path, str(index)))
    else:
        yield path, value


def _shown(value: object) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)

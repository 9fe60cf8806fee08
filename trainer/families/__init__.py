"""Families by name, imported only when asked for. Without torch, since the job schema takes each room's ``spec.py``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import trainer.spec.families as known

if TYPE_CHECKING:
    from .base import Family


def open_family(model: "known.Model") -> "Family":
    """The family of a job's ``model:`` section."""
    return _class(model.family)(model)


def recognise(url: str) -> dict[str, str] | None:
    """What the release at ``url`` itself says of a job's ``model:`` section, its family first; None if none has it."""
    for name in known.FAMILIES:
        told = _class(name).told_by(url)
        if told is not None:
            return {"family": name, **told}
    return None


def _class(family: str) -> "type[Any]":
    module, name = known.FAMILIES[family].implementation.split(":")
    return getattr(import_module(module), name)

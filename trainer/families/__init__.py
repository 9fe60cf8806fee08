"""Families by name, imported only when asked for. Without torch, since the job schema takes each room's ``spec.py``."""

from importlib import import_module
from typing import TYPE_CHECKING

import trainer.spec.families as known

if TYPE_CHECKING:
    from .base import Family


def open_family(model: "known.Model") -> "Family":
    """The family of a job's ``model:`` section."""
    module, name = known.FAMILIES[model.family].implementation.split(":")
    return getattr(import_module(module), name)(model)

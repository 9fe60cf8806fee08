"""Families by name, imported only when asked for."""

from importlib import import_module

from trainer.spec.model import Model

from .base import Batch, Example, Family

_ROOMS = {"musicgen": "trainer.families.musicgen.family:MusicGenFamily"}


def open_family(model: Model) -> Family:
    """The family of a job's ``model:`` section."""
    module, name = _ROOMS[model.family].split(":")
    return getattr(import_module(module), name)(model)


__all__ = ["Batch", "Example", "Family", "open_family"]

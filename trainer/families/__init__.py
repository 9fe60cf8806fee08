"""Families by name, imported only when asked for."""

from importlib import import_module

from trainer.spec.model import Model

from .base import Arrays, Autoregressive, Batch, Example, Family, Predictions

_ROOMS = {
    "ace_step": "trainer.families.ace_step.family:AceStepFamily",
    "fish_speech": "trainer.families.fish_speech.family:FishSpeechFamily",
    "heartmula": "trainer.families.heartmula.family:HeartMuLaFamily",
    "musicgen": "trainer.families.musicgen.family:MusicGenFamily",
    "songbloom": "trainer.families.songbloom.family:SongBloomFamily",
}
FAMILY_NAMES = tuple(_ROOMS)


def open_family(model: Model) -> Family:
    """The family of a job's ``model:`` section."""
    module, name = _ROOMS[model.family].split(":")
    return getattr(import_module(module), name)(model)


__all__ = [
    "FAMILY_NAMES",
    "Arrays",
    "Autoregressive",
    "Batch",
    "Example",
    "Family",
    "Predictions",
    "open_family",
]

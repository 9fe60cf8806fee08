"""All families, by name: each room of ``trainer.families`` says in its ``spec.py`` what it is."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, TypeAlias, Union, cast

from pydantic import Field

from .family import Dims, FamilySpec, Preset
from .model import BaseModelSpec

ROOMS = ("musicgen", "songbloom", "heartmula", "ace_step", "fish_speech")
"""Below ``trainer.families``; a family is added by its folder there and its name here."""
FAMILIES: Mapping[str, FamilySpec] = {
    name: cast("FamilySpec", import_module(f"trainer.families.{name}.spec").SPEC) for name in ROOMS
}
"""All families, by name."""
PRESETS: Mapping[str, Preset] = {
    name: preset for family in FAMILIES.values() for name, preset in family.presets.items()
}
"""All presets, by full name."""

if TYPE_CHECKING:
    Model: TypeAlias = BaseModelSpec
else:
    Model = Annotated[Union[tuple(one.options for one in FAMILIES.values())], Field(discriminator="family")]  # noqa: UP007
"""``model:`` of a job."""


def codec_of(model: Model) -> str:
    """The codec's name: as given, else what the weights were made with."""
    if model.codec.name:
        return model.codec.name
    possible = FAMILIES[model.family].codecs
    small = "pocket" in possible and model.pretrained in ("builtin:pocket", "random:tiny")
    return "pocket" if small else possible[0]


def sampling_of(model: Model) -> dict[str, float | str]:
    """What upstream samples the release with: every field of ``validation.sampling`` that the family listens to."""
    family = FAMILIES[model.family]
    return {**family.sampling, **family.other_sampling(model)}


def dims_of(model: Model) -> Dims:
    """The network's size: as the job or the network's configuration tells it, else the release's.

    Raises:
        JobError: if there is a ``config.json`` that cannot be understood.
    """
    family = FAMILIES[model.family]
    told = family.other_dims(model)
    return told or (family.tiny if model.pretrained == "random:tiny" else family.dims)

"""Codecs by name, imported only when asked for."""

from importlib import import_module
from typing import Any

from trainer.spec.families import Model, codec_of

from .base import Codec

_CODECS = {
    "dcae": "trainer.codecs.dcae:Dcae",
    "encodec": "trainer.codecs.encodec:Encodec",
    "firefly": "trainer.codecs.firefly:FireflyCodec",
    "heartcodec": "trainer.codecs.heartcodec:HeartCodec",
    "pocket": "trainer.codecs.pocket:PocketCodec",
    "songbloom": "trainer.codecs.songbloom:SongBloomCodec",
}


def open_codec(model: Model) -> Codec:
    """The codec of a job's ``model:`` section, with its weights."""
    return _class(model).open(model)


def timed_of(model: Model) -> tuple[str, ...]:
    """``Codec.timed`` of the codec of a job's ``model:`` section; its weights need not be there."""
    return _class(model).timed


def _class(model: Model) -> Any:
    module, name = _CODECS[codec_of(model)].split(":")
    return getattr(import_module(module), name)


__all__ = ["Codec", "open_codec", "timed_of"]

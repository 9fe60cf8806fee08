"""Upstream's packed data: ``.protos`` files, read without protobuf.

A file is a stream of [uint32 length, little-endian][message ``TextData``]; the fields are those of
fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/datasets/protos/text-data.proto. The encoding is described in
https://protobuf.dev/programming-guides/encoding/.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.shapes import Int
from trainer.spec.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Sentence:
    """One recording.

    Attributes:
        texts: transcripts of it, as the packer left them.
        codes: as the codec gave them.
    """

    texts: list[str]
    codes: Int[np.ndarray, "K T"]


@dataclass(frozen=True)
class Group:
    """Recordings of one speaker.

    Attributes:
        source: where they come from.
        name: of the speaker.
        sentences: in the packer's order.
    """

    source: str
    name: str
    sentences: list[Sentence]


def read_protos(file: Path) -> Iterator[Group]:
    """The groups of a ``.protos`` file, one after the other.

    Raises:
        DataError: the file is damaged or something else.
    """
    with file.open("rb") as stream:
        while head := stream.read(4):
            try:
                (length,) = struct.unpack("<I", head)
                message = stream.read(length)
                if len(message) < length:
                    raise ValueError("it ends in the middle of a group")
                yield _group(message)
            except (ValueError, IndexError, OverflowError, struct.error) as error:
                raise DataError(f"{file}: is no .protos file, or damaged: {error}", "pack or copy it again") from error


def _group(message: bytes) -> Group:
    source, name, sentences = "", "", []
    for field, value in _fields(message):
        if field == 1:
            source = _bytes(value).decode()
        elif field == 2:
            name = _bytes(value).decode()
        elif field == 4:
            sentences.append(_sentence(_bytes(value)))
    return Group(source, name, sentences)


def _sentence(message: bytes) -> Sentence:
    texts, books = [], []
    for field, value in _fields(message):
        if field == 1:
            texts.append(_bytes(value).decode())
        elif field == 3:
            books.append(_semantics(_bytes(value)))
    return Sentence(texts, np.array(books, np.uint16))


def _semantics(message: bytes) -> list[int]:
    """Codes of one codebook, packed or one by one."""
    values: list[int] = []
    for field, value in _fields(message):
        if field == 1 and isinstance(value, int):
            values.append(value)
        elif field == 1:
            packed, place = _bytes(value), 0
            while place < len(packed):
                code, place = _varint(packed, place)
                values.append(code)
    return values


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; of those of fixed width, the bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, place = _varint(message, place)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if place + length > len(message):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text or a message belongs")
    return value

"""``data:``: which songs, and how they become shards."""

from collections.abc import Iterable
from typing import Annotated, Literal, cast

from pydantic import Discriminator, Field, Tag

from .base import PositiveFloat, PositiveInt, Spec, StoreUrl, WeightsUrl


class DatasetRef(Spec):
    """A prepared dataset and how often it is visited, compared with the others."""

    dataset: StoreUrl
    weight: PositiveFloat = 1.0


class HeldOut(Spec):
    """Hold a fraction of the songs out of training, whole groups at a time."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    by: Literal["group", "song"] = "group"
    """``group``: songs of one singer, album or folder are held out together, so that validation is honest."""


class ValidationSet(Spec):
    """Validate on a dataset of its own."""

    dataset: StoreUrl


def _validation_kind(value: object) -> str:
    keys = cast("Iterable[str]", value if isinstance(value, dict) else getattr(value, "model_fields_set", ()))
    return "dataset" if "dataset" in keys else "held_out"


Validation = Annotated[
    Annotated[HeldOut, Tag("held_out")] | Annotated[ValidationSet, Tag("dataset")], Discriminator(_validation_kind)
]


class _Source(Spec):
    path: str
    """A folder, file or URL; a relative path starts from the current folder."""


class FolderSource(_Source):
    """Audio files with ``.txt`` tags and ``.lyrics`` beside them; each sub-folder is a group.

    ``{stem}`` in the file-name patterns is the audio file's name without its ending. HeartMuLa tokens are read from
    ``{stem}.tokens.npy`` where present.
    """

    type: Literal["folder"]
    tags_filename: str = "{stem}.txt"
    lyrics_filename: str = "{stem}.lyrics"


class JsonlSource(_Source):
    """One JSON object a line: ``path`` (relative to the file), ``description`` or ``tags``, ``lyrics``, ``group``."""

    type: Literal["jsonl"]
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field → the file's key, where they differ: ``{tags: caption}``."""


class ZipSource(_Source):
    """A folder of ZIP batches of audio with a ``metadata.jsonl``; one is unpacked at a time, so disk stays bounded."""

    type: Literal["zip"]


class SpeakersSource(_Source):
    """``SPEAKER/NAME.wav`` (or ``.mp3``, ``.flac``, …) with a transcript ``NAME.lab``.

    FireflyGAN's codes are read from ``NAME.npy`` where present, as fish-speech's ``extract_vq.py`` leaves them.
    """

    type: Literal["speakers"]


class ProtosSource(_Source):
    """A folder of fish-speech's ``.protos`` files, which hold codes and transcripts and no audio."""

    type: Literal["protos"]


class HuggingFaceSource(_Source):
    """A HF data set (``org/name`` or a local folder): audio, or tokens as they come with HeartMuLa sets."""

    type: Literal["huggingface"]
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)


class DemoSource(Spec):
    """Songs synthesised by utaforge itself, so that a first run needs no data."""

    type: Literal["demo"]
    style: Literal["a", "b"]
    songs: PositiveInt = 6


class JaCappellaSource(_Source):
    """jaCappella songs with ``*_SVS.musicxml`` lyrics."""

    type: Literal["jacappella"]
    audio: Literal["lead_vocal", "mixture"] = "mixture"


Source = Annotated[
    FolderSource
    | JsonlSource
    | ZipSource
    | SpeakersSource
    | ProtosSource
    | HuggingFaceSource
    | JaCappellaSource
    | DemoSource,
    Field(discriminator="type"),
]


class Transcribe(Spec):
    """Write lyrics for songs that have none, with faster-whisper."""

    model: WeightsUrl
    structure_tags: bool = True


class Lyrics(Spec):
    """What is done to lyrics before they are stored."""

    clean: Literal["japanese"] | None = None
    """``japanese`` keeps kana, kanji, ー, ・ and punctuation; songs left without lyrics are skipped and named."""
    transcribe: Transcribe | None = None


class Prepare(Spec):
    """How songs become shards of the first dataset in ``data.train``."""

    source: Source
    mode: Literal["shards", "on-the-fly"] = "shards"
    """``on-the-fly`` encodes while training, for small sets."""
    lyrics: Lyrics = Lyrics()
    loudness: Annotated[float, Field(ge=-70, le=0)] | None = None
    """Normalise to this integrated loudness, LUFS."""
    limit: PositiveInt | None = None
    """Only the first so many songs of the source, to try things with."""
    min_seconds: PositiveFloat = 1.0
    max_seconds: PositiveFloat | None = None
    silence: Annotated[float, Field(le=0)] = -60.0
    """Songs whose loudest moment is below this level (dBFS) are refused as silent."""
    shard_songs: PositiveInt = 256
    disk_gb: PositiveFloat = 20.0
    """Temporary disk that preparing may use."""


class Data(Spec):
    """Training and validation data."""

    train: Annotated[tuple[DatasetRef, ...], Field(min_length=1)]
    validation: Validation = HeldOut()
    prepare: Prepare | None = None

"""Songs → shards: decode, check, level, encode, compute the family's conditions, publish."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from trainer.audio.decode import load
from trainer.audio.loudness import normalise
from trainer.codecs import Codec, open_codec
from trainer.families import open_family
from trainer.families.base import Family
from trainer.shapes import Float, Int
from trainer.spec.data import Prepare
from trainer.spec.errors import DataError
from trainer.spec.job import Job
from trainer.store import open_store

from .dataset import Dataset, Failure, Writer, newest
from .shards import ShardFormat, Song
from .sources import SongSource, SourceSong, open_source

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str, Failure | None], None]
"""Told after each song: how many of how many are done, its name, and why it was left out if it was."""
_PROBE = {"tags": "utaforge 歌", "lyrics": ""}
_NAMED_FAILURES = 10
FEATURES_OFF_SECONDS = 1.0
"""By which features may be longer or shorter than their song: encoders round, and lose frames at the ends."""


def prepare(job: Job, progress: Progress | None = None) -> Dataset:
    """Make the shards of ``job``'s first dataset from its ``data.prepare`` source, unless they are there already.

    Songs that cannot be used are left out, each with its reason in the dataset's ``failures``.

    Raises:
        DataError: no song could be used, or the job has nothing to prepare from.
        StoreError: the store failed.
    """
    spec = job.data.prepare
    if spec is None:
        raise DataError("the job has no data.prepare section", "name a source of songs there")
    tools = Tools(spec, open_codec(job.model), open_family(job.model), job.model.family)
    return prepare_songs(job.data.train[0].dataset, tools, progress)


def progress_lines(seconds: float = 5.0) -> Progress:
    """A ``Progress`` that logs a line with rate and time left: the first, the last, and one every few ``seconds``."""
    first = told = math.nan

    def progress(done: int, total: int, name: str, failure: Failure | None) -> None:
        nonlocal first, told
        now = time.monotonic()
        if done == 1:
            first = now
        elif done < total and now - told < seconds:
            return
        told = now
        rate = (done - 1) / (now - first) if now > first else 0.0
        pace = f" · {rate:.1f} songs/s · {(total - done) / rate:.0f} s left" if rate else ""
        log.info("prepared %d/%d songs%s", done, total, pace)

    return progress


@dataclass(frozen=True)
class Tools:
    """What turns audio into the rows of a shard."""

    spec: Prepare
    codec: Codec
    family: Family
    family_name: str


def prepare_songs(url: str, tools: Tools, progress: Progress | None = None) -> Dataset:
    """``prepare`` with its tools already in hand."""
    store = open_store(url)
    with open_source(tools.spec.source) as source:
        probe = tools.family.conditions([_PROBE])[0]
        prepared_from = _prepared_from(source, tools, probe)
        current = newest(url)
        if current is not None and current.prepared_from == prepared_from:
            log.info("%s is up to date (version %d)", url, current.version)
            return current
        store.check_writable()
        writer: Writer | None = None
        failures: list[Failure] = []
        prepared = _prepared(source, tools, failures, progress or (lambda *_: None))
        while shard := list(islice(prepared, tools.spec.shard_songs)):
            if songs := list(_with_conditions(shard, tools.family, failures)):
                writer = writer or Writer(store, _format(tools, songs[0]))
                writer.add(songs)
    if writer is None:
        raise _nothing(tools.spec, failures)
    return writer.commit(prepared_from, failures)


def _prepared_from(source: SongSource, tools: Tools, probe: dict[str, np.ndarray]) -> str:
    """Hash of everything that decides what the dataset will hold."""
    parts = [
        tools.spec.model_dump_json(),
        source.inputs(),
        tools.codec.name,
        tools.codec.fingerprint,
        tools.family_name,
        *(f"{name} {hashlib.sha256(array.tobytes()).hexdigest()}" for name, array in sorted(probe.items())),
        *(f"{name} {told}" for name, told in sorted(tools.family.features().items())),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _format(tools: Tools, song: Song) -> ShardFormat:
    codec = tools.codec
    return ShardFormat(
        family=tools.family_name,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        sample_rate=codec.sample_rate,
        frame_rate=codec.frame_rate,
        codebooks=codec.codebooks,
        vocabulary=codec.vocabulary,
        timed=codec.timed,
        dtypes={name: array.dtype.name for name, array in song.arrays.items()},
        latent_shape=song.arrays["latents"].shape[:-1] if "latents" in song.arrays else (),
    )


def _prepared(source: SongSource, tools: Tools, failures: list[Failure], progress: Progress) -> Iterator[Song]:
    songs = source.songs()[: tools.spec.limit]
    for done, song in enumerate(songs, 1):
        name, failure = (song.name, song) if isinstance(song, Failure) else (song.audio, None)
        if isinstance(song, SourceSong):
            try:
                yield _with_features(_encoded(source, song, tools), source, song, tools.family)
            except DataError as error:
                failure = Failure(name, error.problem)
        if failure is not None:
            failures.append(failure)
            log.warning("left out: %s: %s", failure.name, failure.reason)
        progress(done, len(songs), name, failure)


def _encoded(source: SongSource, song: SourceSong, tools: Tools) -> Song:
    codec, spec = tools.codec, tools.spec
    if (given := source.codes(song)) is not None:
        codes = _checked(given, codec)
        frames = codes.shape[1]
        seconds = frames / codec.frame_rate
        _check_length(seconds, spec)
        return _song(song, seconds, frames, {"codes": codes})
    with source.files.local(song.audio) as path:
        try:
            audio = load(path, codec.sample_rate, codec.channels)
        except DataError as error:
            raise DataError(error.problem.removeprefix(f"{path}: "), error.cure) from error
    seconds = audio.shape[1] / codec.sample_rate
    _check_length(seconds, spec)
    _check_level(audio, spec)
    if spec.loudness is not None:
        audio = normalise(audio, codec.sample_rate, spec.loudness)
    arrays = codec.encode(audio)
    return _song(song, seconds, arrays[codec.timed[0]].shape[-1], arrays)


def _with_features(made: Song, source: SongSource, song: SourceSong, family: Family) -> Song:
    """The song with the features [L, W] that lie beside it, in float16."""
    arrays = {
        name: _checked_features(name, source.features(song, name), rate, width, made.seconds)
        for name, (rate, width) in family.features().items()
    }
    return replace(made, arrays={**made.arrays, **arrays})


def _checked_features(
    name: str, given: np.ndarray, rate: float, width: int, seconds: float
) -> Float[np.ndarray, "L W"]:
    if given.dtype.kind != "f" or given.ndim != 2 or given.shape[1] != width:
        raise DataError(
            f"the {name} features given with it are {given.dtype} {list(given.shape)}, "
            f"the model takes floats [L, {width}]"
        )
    if abs(len(given) / rate - seconds) > FEATURES_OFF_SECONDS:
        raise DataError(
            f"the {name} features given with it are those of {len(given) / rate:.1f} s at {rate:g} a second, "
            f"the song has {seconds:.1f} s"
        )
    with np.errstate(over="ignore"):
        features = given.astype(np.float16)
    if not np.isfinite(features).all():
        raise DataError(f"the {name} features given with it are not all numbers that float16 can hold")
    return features


def _song(song: SourceSong, seconds: float, frames: int, arrays: dict[str, np.ndarray]) -> Song:
    return Song(song.id, song.group, song.tags, song.lyrics, seconds, frames, song.audio, arrays)


def _checked(codes: np.ndarray, codec: Codec) -> Int[np.ndarray, "K T"]:
    """Codes that a source has given, the right way round and in the least type."""
    shape, books = codes.shape, codec.codebooks
    if codes.ndim == 2 and shape[1] == books != shape[0]:
        codes = codes.T
    if codec.timed != ("codes",) or codes.dtype.kind not in "iu" or codes.ndim != 2 or len(codes) != books:
        found = f"the codes given with it are {codes.dtype} {list(shape)}"
        raise DataError(f"{found}, codec {codec.name} makes integers [{books}, T]")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.vocabulary:
        low, high = codes.min(), codes.max()
        raise DataError(
            f"the codes given with it are {low} to {high}, codec {codec.name} has 0 to {codec.vocabulary - 1}"
        )
    return codes.astype(np.min_scalar_type(codec.vocabulary - 1))


def _check_length(seconds: float, spec: Prepare) -> None:
    if seconds < spec.min_seconds:
        raise DataError(f"is too short: {seconds:.1f} s, data.prepare.min_seconds is {spec.min_seconds:g}")
    if spec.max_seconds is not None and seconds > spec.max_seconds:
        raise DataError(f"is too long: {seconds:.1f} s, data.prepare.max_seconds is {spec.max_seconds:g}")


def _check_level(audio: np.ndarray, spec: Prepare) -> None:
    peak = float(np.abs(audio).max())
    level = 20 * math.log10(peak) if peak > 0 else -math.inf
    if level < spec.silence:
        raise DataError(f"is silent: its loudest moment is {level:.0f} dBFS, data.prepare.silence is {spec.silence:g}")


def _with_conditions(songs: Sequence[Song], family: Family, failures: list[Failure]) -> Iterator[Song]:
    """The songs with what the family computes from their texts; those whose texts it cannot use become failures."""
    try:
        found = family.conditions([{"tags": song.tags, "lyrics": song.lyrics} for song in songs])
    except DataError as error:
        if len(songs) > 1:
            for song in songs:
                yield from _with_conditions([song], family, failures)
            return
        failures.append(Failure(songs[0].source, error.problem))
        log.warning("left out: %s: %s", songs[0].source, error.problem)
        return
    for song, arrays in zip(songs, found, strict=True):
        yield replace(song, arrays={**song.arrays, **arrays})


def _nothing(spec: Prepare, failures: Sequence[Failure]) -> DataError:
    where = getattr(spec.source, "path", "the source")
    if not failures:
        return DataError(f"{where}: holds no songs", "correct data.prepare.source in the job file")
    named = [f"  {failure.name}: {failure.reason}" for failure in failures[:_NAMED_FAILURES]]
    more = len(failures) - len(named)
    problem = f"{where}: none of its {len(failures)} songs can be used:\n" + "\n".join(named)
    return DataError(problem + (f"\n  and {more} more" if more else ""), "repair these files or name another source")

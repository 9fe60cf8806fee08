"""Which songs are in which batch: a pure function of (songs, seed, epoch, weights, budget).

An epoch is a list of *global* batches, each a list of micro-batches of similar length. The world size only says which
rank takes which micro-batch, so the data position is two numbers (epoch, global batch), resuming costs nothing, and
four GPUs see the same batches as one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from trainer.spec.errors import DataError
from trainer.spec.job import BatchSeconds, BatchSongs

Position = tuple[int, int]
"""(epoch, index of the global batch in it)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A song, or a part of a long one, on one visit.

    Attributes:
        dataset: which of the planned datasets, from 0.
        song: the song's id in it.
        start: first frame.
        frames: how many.
        seed: of every random draw made for it on this visit.
    """

    dataset: int
    song: str
    start: int
    frames: int
    seed: int


MicroBatch = tuple[Segment, ...]


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together take in one optimizer step: micro-batches, the longest segments first."""

    epoch: int
    index: int
    micro: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Pool:
    """The songs of one dataset that may be visited.

    Attributes:
        ids: song ids.
        frames: their lengths.
        weight: how often each is visited, compared with songs of the other pools.
    """

    ids: Sequence[str]
    frames: Sequence[int]
    weight: float = 1.0


class Planner:
    """Plans global batches.

    An epoch visits every song of the pools with the largest weight once. A pool of half that weight gives half of its
    songs to an epoch and the others to the next, and so on: within its own round of a pool no song is left out or
    repeated, for any weights. Songs longer than ``segment_frames`` are cut into segments of nearly equal length that
    cover them exactly.

    Args:
        pools: the songs, by dataset.
        seed: of the order and of all segment seeds.
        batch: audio or segments in a global batch.
        frame_rate: frames per second.
        micro_frames: most frames in a micro-batch, padding included; at least one segment fits always.
        segment_frames: most frames in a segment.

    Raises:
        DataError: there is nothing to visit.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        *,
        seed: int,
        batch: BatchSeconds | BatchSongs,
        frame_rate: float,
        micro_frames: int,
        segment_frames: int,
    ) -> None:
        visitable = [pool for pool in pools if sum(pool.frames)]
        if not visitable:
            raise DataError("there are no songs to train on", "add songs, or hold fewer of them out for validation")
        self._pools = [(list(pool.ids), [int(frames) for frames in pool.frames]) for pool in pools]
        largest = max(Fraction(pool.weight) for pool in visitable)
        self._rates = [min(Fraction(1), Fraction(pool.weight) / largest) for pool in pools]
        self._seed = seed
        self._micro_frames = micro_frames
        self._segment_frames = segment_frames
        self._by_songs = isinstance(batch, BatchSongs)
        self._budget = batch.songs if isinstance(batch, BatchSongs) else max(1, round(batch.seconds * frame_rate))

    def epoch(self, epoch: int) -> list[GlobalBatch]:
        """All global batches of an epoch, in order. The last one may be smaller than the others."""
        cut = _Cut(self._segment_frames, f"{self._seed}/{epoch}")
        segments = [
            segment
            for dataset, (ids, frames) in enumerate(self._pools)
            for song in self._visited(dataset, epoch)
            for segment in cut(dataset, ids[song], frames[song])
        ]
        order = _permutation(len(segments), f"{self._seed}/order/{epoch}")
        batches = self._fill([segments[i] for i in order])
        return [GlobalBatch(epoch, i, _micro_batches(batch, self._micro_frames)) for i, batch in enumerate(batches)]

    def batches(self, start: Position = (0, 0)) -> Iterator[GlobalBatch]:
        """Global batches from ``start`` on, epoch after epoch, without end."""
        epoch, index = start
        while True:
            yield from self.epoch(epoch)[index:]
            epoch, index = epoch + 1, 0

    def _visited(self, dataset: int, epoch: int) -> list[int]:
        """Songs of ``dataset`` that belong to ``epoch``: the next part of its endless row of shuffled rounds."""
        songs = len(self._pools[dataset][0])
        begin, end = (int(self._rates[dataset] * songs * at) for at in (epoch, epoch + 1))
        visited: list[int] = []
        while begin < end:
            round_, offset = divmod(begin, songs)
            order = _permutation(songs, f"{self._seed}/round/{dataset}/{round_}")
            visited += order[offset : offset + end - begin].tolist()
            begin = min(end, (round_ + 1) * songs)
        return visited

    def _fill(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        chosen: list[Segment] = []
        used = 0
        for segment in segments:
            size = 1 if self._by_songs else segment.frames
            if chosen and used + size > self._budget:
                yield chosen
                chosen, used = [], 0
            chosen.append(segment)
            used += size
        if chosen:
            yield chosen


def in_order(pools: Sequence[Pool], *, micro_frames: int, segment_frames: int) -> GlobalBatch:
    """Every song of ``pools`` once, always in the same micro-batches with the same seeds: for validation."""
    cut = _Cut(segment_frames, "validation")
    segments = [
        segment
        for dataset, pool in enumerate(pools)
        for song, frames in zip(pool.ids, pool.frames, strict=True)
        for segment in cut(dataset, song, int(frames))
    ]
    return GlobalBatch(0, 0, _micro_batches(segments, micro_frames))


def share(batch: GlobalBatch, rank: int, world: int) -> list[tuple[MicroBatch, float]]:
    """The micro-batches that ``rank`` of ``world`` takes, with their weights.

    All ranks get equally many, of similar lengths at the same turn; what is missing at the end is filled with repeats
    of weight 0.
    """
    turns = -(-len(batch.micro) // world)
    chosen = [(batch.micro[i], 1.0) for i in range(rank, len(batch.micro), world)]
    return chosen + [(batch.micro[-1], 0.0) for _ in range(turns - len(chosen))]


@dataclass(frozen=True)
class _Cut:
    """Cuts songs into segments of at most ``longest`` frames, whose seeds begin with ``prefix``."""

    longest: int
    prefix: str

    def __call__(self, dataset: int, song: str, frames: int) -> Iterator[Segment]:
        if frames == 0:
            return
        parts = -(-frames // self.longest)
        for start, end in pairwise(part * frames // parts for part in range(parts + 1)):
            yield Segment(dataset, song, start, end - start, _seed(f"{self.prefix}/{dataset}/{start}/{song}"))


def _micro_batches(segments: Sequence[Segment], micro_frames: int) -> tuple[MicroBatch, ...]:
    """Segments of similar length together, so that padding is small; the longest first."""
    batches: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (-s.frames, s.dataset, s.song, s.start)):
        if batches and batches[-1][0].frames * (len(batches[-1]) + 1) <= micro_frames:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return tuple(tuple(batch) for batch in batches)


def _permutation(count: int, name: str) -> np.ndarray:
    # Raw words of a bit generator are the same in every numpy version; `permutation` is not promised to be.
    return np.argsort(np.random.Philox(key=_seed(name)).random_raw(count), kind="stable")


def _seed(name: str) -> int:
    """63 bits that follow from ``name`` alone, on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

"""Batches for one rank, made ahead of time in a thread."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from trainer.families.base import Batch, Example

from .dataset import Dataset
from .planner import MicroBatch, Planner, Position, Segment, in_order, share

_STEPS_AHEAD = 2


class Collate(Protocol):
    """``Family.collate``."""

    def __call__(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """A micro-batch of ``examples``."""
        ...


@dataclass(frozen=True)
class Step:
    """What one rank takes in one optimizer step.

    Attributes:
        micro: micro-batches and their weights; weight 0 is a repeat that only keeps the ranks in step.
        position: of the step that comes next: (epoch, global batch).
    """

    micro: list[tuple[Batch, float]]
    position: Position


class Loader:
    """The training data of one rank, one ``Step`` after the other without end; use it in a ``with`` statement.

    Reading and collating run ahead in a thread; what goes wrong there is raised where the steps are taken.

    Args:
        datasets: those whose pools ``planner`` was given, in the same order.
        planner: says what comes when.
        collate: of the model's family.
        rank: this rank.
        world: how many ranks there are.
        start: the position to begin at.

    Attributes:
        wait_seconds: how long the last step had to be waited for.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        planner: Planner,
        collate: Collate,
        *,
        rank: int = 0,
        world: int = 1,
        start: Position = (0, 0),
    ) -> None:
        self.wait_seconds = 0.0
        self._datasets = datasets
        self._planner = planner
        self._collate = collate
        self._rank, self._world, self._start = rank, world, start
        self._ready: queue.Queue[Step | Exception] = queue.Queue(_STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        begin = time.perf_counter()
        step = self._ready.get()
        self.wait_seconds = time.perf_counter() - begin
        if isinstance(step, Exception):
            self._offer(step)
            raise step
        return step

    def _work(self) -> None:
        try:
            for step in self._steps():
                if not self._offer(step):
                    return
        except Exception as error:  # noqa: BLE001  (carried to the thread that takes the steps)
            self._offer(error)

    def _steps(self) -> Iterator[Step]:
        for batch in self._planner.batches(self._start):
            micro = [
                (make_batch(self._datasets, segments, self._collate, training=True), weight)
                for segments, weight in share(batch, self._rank, self._world)
            ]
            yield Step(micro, (batch.epoch, batch.index + 1))

    def _offer(self, step: Step | Exception) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(step, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def validation_batches(
    datasets: Sequence[Dataset],
    ids: Sequence[Sequence[str]],
    collate: Collate,
    *,
    micro_frames: int,
    segment_frames: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Batch, float]]:
    """This rank's share of the songs ``ids`` (by dataset): always the same micro-batches in the same order."""
    pools = [dataset.pool(songs) for dataset, songs in zip(datasets, ids, strict=True)]
    everything = in_order(pools, micro_frames=micro_frames, segment_frames=segment_frames)
    for segments, weight in share(everything, rank, world):
        yield make_batch(datasets, segments, collate, training=False), weight


def make_batch(datasets: Sequence[Dataset], segments: MicroBatch, collate: Collate, *, training: bool) -> Batch:
    """The micro-batch of ``segments``."""
    return collate([_example(datasets[segment.dataset], segment) for segment in segments], training=training)


def _example(dataset: Dataset, segment: Segment) -> Example:
    song = dataset.song(segment.song)
    end = segment.start + segment.frames
    cut = {name: song.arrays[name][..., segment.start : end] for name in dataset.format.timed}
    return Example(
        id=song.id,
        arrays={**song.arrays, **cut},
        text={"tags": song.tags, "lyrics": song.lyrics},
        seed=segment.seed,
        ends=end == song.frames,
    )

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch

from tests.unit.data.conftest import make_song, write
from trainer.data.dataset import Dataset
from trainer.data.loader import Loader, Step, validation_batches
from trainer.data.planner import Planner
from trainer.families.base import Batch, Example
from trainer.spec.errors import StoreError
from trainer.spec.job import BatchSongs

SONGS = [make_song(f"歌{i}", frames=10 + i) for i in range(20)]


def collate(examples: Sequence[Example], *, training: bool) -> Batch:
    """Codes padded with 0, and the seeds."""
    longest = max(example.arrays["codes"].shape[1] for example in examples)
    codes = [np.pad(e.arrays["codes"], ((0, 0), (0, longest - e.arrays["codes"].shape[1]))) for e in examples]
    tensors = {
        "codes": torch.from_numpy(np.stack(codes).astype(np.int64)),
        "song": torch.tensor([int(example.id.removeprefix("歌")) for example in examples]),
        "seed": torch.tensor([example.seed for example in examples]),
    }
    frames = sum(example.arrays["codes"].shape[1] for example in examples)
    return Batch(tensors, {"ce": frames if training else 0.0}, frames)


@pytest.fixture
def dataset(url) -> Dataset:
    return write(url, SONGS)


def planner(dataset: Dataset) -> Planner:
    pool = dataset.pool(dataset.songs.ids)
    return Planner([pool], seed=3, batch=BatchSongs(songs=6), frame_rate=50.0, micro_frames=60, segment_frames=16)


def take(dataset: Dataset, steps: int, **options) -> list[Step]:
    with Loader([dataset], planner(dataset), collate, **options) as loader:
        return list(islice(loader, steps))


def same(a: Step, b: Step) -> bool:
    return a.position == b.position and all(
        x.counts == y.counts and v == w and all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
        for (x, v), (y, w) in zip(a.micro, b.micro, strict=True)
    )


def test_an_epoch_brings_every_frame_of_every_song_once(dataset):
    steps = take(dataset, len(planner(dataset).epoch(0)))
    frames: Counter[int] = Counter()
    for batch, weight in (pair for step in steps for pair in step.micro):
        assert weight == 1.0
        frames[batch.frames] += 1
        assert batch.tensors["codes"].shape[-1] <= 16
    assert sum(size * times for size, times in frames.items()) == sum(song.frames for song in SONGS)


def test_segments_hold_the_songs_own_codes(dataset):
    batch, _ = take(dataset, 1)[0].micro[0]
    segment = planner(dataset).epoch(0)[0].micro[0][0]
    song = next(song for song in SONGS if song.id == segment.song)
    expected = song.arrays["codes"][:, segment.start : segment.start + segment.frames]
    np.testing.assert_array_equal(batch.tensors["codes"][0, :, : segment.frames], expected)
    assert batch.tensors["seed"][0] == segment.seed


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one(dataset, world):
    alone = take(dataset, 5)
    ranks = [take(dataset, 5, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        assert len({len(rank[step].micro) for rank in ranks}) == 1
        counted = [batch for rank in ranks for batch, weight in rank[step].micro if weight]
        assert sorted(batch.frames for batch in counted) == sorted(batch.frames for batch, _ in whole.micro)
        seeds = {seed for batch in counted for seed in batch.tensors["seed"].tolist()}
        assert seeds == {seed for batch, _ in whole.micro for seed in batch.tensors["seed"].tolist()}


def test_a_step_tells_where_to_resume(dataset):
    steps = take(dataset, 12)
    assert steps[-1].position[0] > 0
    for done in (1, 5, 9):
        resumed = take(dataset, 2, start=steps[done - 1].position)
        assert same(resumed[0], steps[done])
        assert same(resumed[1], steps[done + 1])


def test_an_error_while_reading_ahead_reaches_whoever_takes_the_steps(dataset):
    for shard in set(dataset.songs.shards):
        (dataset.store.local / shard).write_bytes(b"")
    with (
        pytest.raises(StoreError, match="is missing or damaged"),
        Loader([dataset], planner(dataset), collate) as loader,
    ):
        next(loader)


def test_leaving_early_ends_the_thread(dataset):
    before = threading.active_count()
    with Loader([dataset], planner(dataset), collate) as loader:
        next(loader)
        assert loader.wait_seconds > 0
    assert threading.active_count() == before


def test_validation_takes_each_song_once_whatever_the_world(dataset):
    ids = dataset.songs.ids[:7]
    for world in (1, 2, 3):
        shares = [
            list(
                validation_batches(
                    [dataset], [ids], collate, micro_frames=60, segment_frames=1000, rank=rank, world=world
                )
            )
            for rank in range(world)
        ]
        assert len({len(share) for share in shares}) == 1
        songs = [
            song for share in shares for batch, weight in share if weight for song in batch.tensors["song"].tolist()
        ]
        assert sorted(songs) == list(range(7))
        assert all(batch.counts == {"ce": 0.0} for share in shares for batch, _ in share)

import random
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from trainer.data.planner import GlobalBatch, Planner, Pool, Segment, in_order, share
from trainer.spec.errors import DataError
from trainer.spec.job import BatchSeconds, BatchSongs

RATE = 50.0


def pool(name: str, songs: int, weight: float = 1.0) -> Pool:
    dice = random.Random(name)
    return Pool([f"{name}-{i}" for i in range(songs)], [dice.randint(20, 3000) for _ in range(songs)], weight)


def planner(*pools: Pool, seed: int = 1, batch=None, segment_frames: int = 1000) -> Planner:
    return Planner(
        pools,
        seed=seed,
        batch=batch or BatchSeconds(seconds=100),
        frame_rate=RATE,
        micro_frames=2000,
        segment_frames=segment_frames,
    )


def segments(batches: list[GlobalBatch]) -> list[Segment]:
    return [segment for batch in batches for micro in batch.micro for segment in micro]


def covered(found: list[Segment]) -> dict[tuple[int, str], list[tuple[int, int]]]:
    spans: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for s in found:
        spans.setdefault((s.dataset, s.song), []).append((s.start, s.start + s.frames))
    return {song: sorted(parts) for song, parts in spans.items()}


def test_every_frame_of_every_song_is_visited_once_an_epoch():
    songs = pool("歌", 137)
    for epoch in range(3):
        spans = covered(segments(planner(songs).epoch(epoch)))
        assert len(spans) == 137
        for (_, song), parts in spans.items():
            ends = [0, *(end for _, end in parts)]
            assert [start for start, _ in parts] == ends[:-1]
            assert ends[-1] == songs.frames[songs.ids.index(song)]
            assert max(end - start for start, end in parts) - min(end - start for start, end in parts) <= 1


@pytest.mark.parametrize("weights", [(1, 1), (1, 0.5), (3, 1), (0.1, 0.7), (1, 0.003)])
def test_no_song_is_lost_or_repeated_in_its_round_for_any_weights(weights):
    pools = [pool("甲", 40, weights[0]), pool("乙", 30, weights[1])]
    plan = planner(*pools, segment_frames=3000)
    visits: list[list[str]] = [[], []]
    for epoch in range(12):
        found = segments(plan.epoch(epoch))
        assert max(Counter((s.dataset, s.song) for s in found).values()) == 1
        for s in found:
            visits[s.dataset].append(s.song)
    for songs, seen, weight in zip(pools, visits, weights, strict=True):
        expected = int(12 * len(songs.ids) * weight / max(weights) + 1e-9)
        assert len(seen) == expected
        rounds = Counter(seen).values()
        assert max(rounds) - (min(rounds) if len(rounds) == len(songs.ids) else 0) <= 1


def test_the_same_global_batches_come_out_of_any_number_of_ranks():
    plan = planner(pool("歌", 80), pool("声", 20, 0.5))
    for batch in plan.epoch(0):
        for world in (1, 2, 3, 4, 8):
            shares = [share(batch, rank, world) for rank in range(world)]
            assert len({len(taken) for taken in shares}) == 1
            counted = [micro for taken in shares for micro, weight in taken if weight == 1.0]
            assert sorted(counted, key=batch.micro.index) == list(batch.micro)
            assert all(weight in (0.0, 1.0) for taken in shares for _, weight in taken)


def test_resuming_anywhere_continues_the_same_sequence():
    plan = planner(pool("歌", 60), pool("声", 25, 0.3))
    whole = list(islice(plan.batches(), 60))
    for at in range(len(whole)):
        position = (0, 0) if at == 0 else (whole[at - 1].epoch, whole[at - 1].index + 1)
        resumed = planner(pool("歌", 60), pool("声", 25, 0.3)).batches(position)
        assert list(islice(resumed, 3)) == list(islice(plan.batches((whole[at].epoch, whole[at].index)), 3))
        assert next(plan.batches(position)) == whole[at]
    assert whole[-1].epoch > 1


def test_budgets_are_kept():
    for batch in planner(pool("歌", 200)).epoch(0):
        assert sum(s.frames for s in segments([batch])) <= 100 * RATE
        for micro in batch.micro:
            assert max(s.frames for s in micro) * len(micro) <= 2000
    counts = [len(segments([b])) for b in planner(pool("歌", 50), batch=BatchSongs(songs=8)).epoch(0)]
    assert set(counts[:-1]) == {8}
    assert 1 <= counts[-1] <= 8


def test_padding_is_small():
    batches = planner(pool("歌", 1000), batch=BatchSeconds(seconds=1200)).epoch(0)
    padded = sum(len(micro) * max(s.frames for s in micro) for batch in batches for micro in batch.micro)
    assert padded / sum(s.frames for s in segments(batches)) < 1.05


def test_a_song_longer_than_every_budget_is_visited_alone():
    plan = Planner(
        [Pool(["長い歌"], [9000])],
        seed=0,
        batch=BatchSeconds(seconds=1),
        frame_rate=RATE,
        micro_frames=10,
        segment_frames=10000,
    )
    assert [s.frames for s in segments(plan.epoch(0))] == [9000]


def test_seeds_follow_from_the_visit_alone_and_differ_between_visits():
    plan = planner(pool("歌", 30))
    first, second = segments(plan.epoch(0)), segments(plan.epoch(1))
    assert len({s.seed for s in first + second}) == len(first) + len(second)
    other_budget = segments(planner(pool("歌", 30), batch=BatchSongs(songs=3)).epoch(0))
    assert {(s.song, s.start, s.seed) for s in first} == {(s.song, s.start, s.seed) for s in other_budget}
    assert {s.seed for s in segments(planner(pool("歌", 30), seed=2).epoch(0))}.isdisjoint(s.seed for s in first)


def test_the_order_changes_with_epoch_and_seed():
    plan = planner(pool("歌", 100))
    assert [s.song for s in segments(plan.epoch(0))] != [s.song for s in segments(plan.epoch(1))]
    assert plan.epoch(0) != planner(pool("歌", 100), seed=2).epoch(0)


def test_another_process_plans_the_same():
    code = (
        "from trainer.data.planner import *; from trainer.spec.job import BatchSeconds\n"
        "p = Planner([Pool([f'歌{i}' for i in range(50)], list(range(100, 150)))], seed=7,"
        " batch=BatchSeconds(seconds=20), frame_rate=50.0, micro_frames=500, segment_frames=120)\n"
        "import hashlib; print(hashlib.sha256(repr(p.epoch(3)).encode()).hexdigest()[:16])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs == ["4348008d6285f07c\n"] * 2


def test_validation_is_always_the_same_and_takes_each_song_once():
    pools = [pool("歌", 20)]
    batch = in_order(pools, micro_frames=2000, segment_frames=1000)
    assert batch == in_order(pools, micro_frames=2000, segment_frames=1000)
    assert sum(s.frames for s in segments([batch])) == sum(pools[0].frames)


def test_nothing_to_visit_is_an_error_before_training():
    for empty in (Pool([], []), Pool(["無音"], [0])):
        with pytest.raises(DataError, match="there are no songs to train on"):
            planner(empty)

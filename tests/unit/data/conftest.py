"""Songs and datasets small enough to read."""

from collections.abc import Sequence

import numpy as np
import pytest

from trainer.data.dataset import Dataset, Writer
from trainer.data.shards import ShardFormat, Song
from trainer.store import open_store

FORMAT = ShardFormat(
    family="musicgen",
    codec="pocket",
    codec_fingerprint="0123456789abcdef",
    sample_rate=16000,
    frame_rate=50.0,
    codebooks=4,
    vocabulary=256,
    timed=("codes",),
    dtypes={"codes": "uint8", "text_hidden": "float16"},
)


def make_song(name: str, frames: int = 20, group: str = "歌手") -> Song:
    """A song whose codes follow from its name."""
    dice = np.random.default_rng(list(name.encode()))
    arrays = {
        "codes": dice.integers(0, 256, (4, frames), dtype=np.uint8),
        "text_hidden": dice.standard_normal((frames % 3, 8)).astype(np.float16),
    }
    return Song(name, group, "明るい, fast", "[verse]\nさくら さくら", frames / 50, frames, f"{name}.wav", arrays)


def write(url: str, songs: Sequence[Song], shard_songs: int = 3) -> Dataset:
    """A dataset of ``songs``."""
    writer = Writer(open_store(url), FORMAT)
    for start in range(0, len(songs), shard_songs):
        writer.add(songs[start : start + shard_songs])
    return writer.commit()


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/資料"

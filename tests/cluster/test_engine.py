"""The engine's numbers depend neither on strategy nor on world size nor on restarts (real gloo ranks and DeepSpeed)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.engine_ranks import main
from tests.cluster.ranks import Ranks

STRATEGIES = ("ddp", "zero2", "zero3")
METHODS = ("lora", "full")
CLOSE = 1e-5


def saved(kind: str) -> str:
    """What two ranks have left: a file, and for ZeRO-3 a folder of shards."""
    return f"{kind.replace('/', '-')}-2{'' if kind.startswith('zero3') else '.safetensors'}"


WHOLE = [f"{strategy}/{method}/fp32" for strategy in STRATEGIES for method in METHODS]
RESUMED = [f"{kind}@{saved(kind)}" for kind in WHOLE]
HALF = ["ddp/lora/bf16", "zero3/lora/bf16", "zero2/lora/fp16"]
ALONE = ["ddp/lora/fp32", "ddp/full/fp32"]
SHRUNK = [
    ("ddp/lora/fp32", "zero3/lora/fp32"),
    ("ddp/full/fp32", "zero2/full/fp32"),
    ("zero2/lora/fp32", "ddp/lora/fp32"),
    ("zero3/full/fp32", "zero3/full/fp32"),
]
"""One rank goes on, by the first way, with what two have saved by the second."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("訓練")
    two = ranks(folder, 2, [*WHOLE, *RESUMED, *HALF])
    one = ranks(folder, 1, [*ALONE, *(f"{kind}@{saved(source)}" for kind, source in SHRUNK)])
    return {1: one, 2: two}


def ranks(folder: Path, world: int, cases: list[str]) -> dict[str, Any]:
    Ranks(world, folder, main, folder, cases).end()
    return json.loads((folder / f"seen-{world}.json").read_text())


def assert_close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = CLOSE) -> None:
    count = len(found["losses"])
    assert found["losses"] == pytest.approx(wanted["losses"][-count:], rel=tolerance)
    assert found["norms"] == pytest.approx(wanted["norms"][-count:], rel=10 * tolerance)
    assert found["after"] == pytest.approx(wanted["after"], rel=tolerance)
    assert found["weights"] == pytest.approx(wanted["weights"], rel=10 * tolerance)


def test_training_trains(seen: dict) -> None:
    for kind in WHOLE:
        assert seen[2][kind]["after"] < seen[2][kind]["before"] - 0.02
        assert seen[2][kind]["tokens"] == [4 * (31 + 21 + 32 + 15 + 18)] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_trains_as_ddp_does(seen: dict, strategy: str, method: str) -> None:
    assert_close(seen[2][f"{strategy}/{method}/fp32"], seen[2][f"ddp/{method}/fp32"])


@pytest.mark.parametrize("kind", ALONE)
def test_one_rank_trains_as_two_do(seen: dict, kind: str) -> None:
    assert_close(seen[1][kind], seen[2][kind])
    assert [terms.keys() for terms in seen[1][kind]["terms"]] == [{"ce", "ce/0", "ce/1", "ce/2", "ce/3"}] * 4


@pytest.mark.parametrize("kind", WHOLE)
def test_going_on_from_a_checkpoint_changes_no_bit(seen: dict, kind: str) -> None:
    whole, resumed = seen[2][kind], seen[2][f"{kind}@{saved(kind)}"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["norms"] == whole["norms"][2:]
    for what in ("after", "weights", "moments", "song"):
        assert resumed[what] == whole[what], what


@pytest.mark.parametrize(("kind", "source"), SHRUNK)
def test_one_rank_goes_on_with_what_two_have_saved(seen: dict, kind: str, source: str) -> None:
    assert_close(seen[1][f"{kind}@{saved(source)}"], seen[2][source])


@pytest.mark.parametrize("kind", HALF)
def test_half_precision_trains_nearly_as_fp32_does(seen: dict, kind: str) -> None:
    assert seen[2][kind]["skipped"] == [False] * 4
    assert_close(seen[2][kind], seen[2]["ddp/lora/fp32"], tolerance=5e-3)


def test_songs_generated_in_training_are_the_same_by_every_strategy(seen: dict) -> None:
    for method in METHODS:
        songs = {json.dumps(seen[2][f"{strategy}/{method}/fp32"]["song"]) for strategy in STRATEGIES}
        assert len(songs) == 1

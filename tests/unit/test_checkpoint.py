"""Checkpoints against a real ``file://`` store."""

import json
import time

import pytest

from trainer.checkpoint import Checkpoints
from trainer.spec.errors import StoreError
from trainer.spec.job import Keep
from trainer.store import open_store

LYRICS = "[verse] さくら さくら"


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/runs/歌/checkpoints")


@pytest.fixture
def checkpoints(store):
    return Checkpoints(store, Keep(last=2, best=1), retry_seconds=())


def commit(checkpoints, step, loss=None, content=b"weights", **meta):
    checkpoints.save(step, {"adapter_model.safetensors": content}, {"validation_loss": loss, **meta})
    checkpoints.wait()


def names(store):
    return store.folders()


def test_what_is_saved_is_restored_with_its_meta(checkpoints, tmp_path):
    local = tmp_path / "optimizer.safetensors"
    local.write_bytes(b"moments")
    state = json.dumps({"lyrics": LYRICS}, ensure_ascii=False).encode()
    checkpoints.save(50, {"state.json": state, "optimizer.safetensors": local}, {"position": [1, 7], "world": 2})
    checkpoints.wait()

    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.name, newest.meta) == (50, "step-00000050", {"position": [1, 7], "world": 2})
    checkpoints.restore(newest, tmp_path / "back")
    assert json.loads((tmp_path / "back/state.json").read_bytes())["lyrics"] == LYRICS
    assert (tmp_path / "back/optimizer.safetensors").read_bytes() == b"moments"


def test_a_run_without_commits_has_neither_newest_nor_best(checkpoints):
    assert checkpoints.newest() is None
    assert checkpoints.best() is None


def test_the_newest_two_and_the_best_stay(checkpoints, store):
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.4)]:
        commit(checkpoints, step, loss)
    assert names(store) == ["step-00000020", "step-00000040", "step-00000050"]
    assert checkpoints.best().step == 20
    assert checkpoints.newest().step == 50


def test_a_loss_that_is_nan_or_missing_is_never_the_best(checkpoints, store):
    commit(checkpoints, 10, float("nan"))
    commit(checkpoints, 20, None)
    assert checkpoints.best() is None
    assert b"NaN" not in store.get("step-00000010/manifest.json")
    commit(checkpoints, 30, 5.0)
    assert checkpoints.best().step == 30


def test_of_equal_losses_the_newest_is_best(checkpoints):
    commit(checkpoints, 10, 1.0)
    commit(checkpoints, 20, 1.0)
    assert checkpoints.best().step == 20


def test_a_folder_without_manifest_is_no_checkpoint_and_goes_with_the_next_commit(checkpoints, store):
    commit(checkpoints, 10)
    store.put("step-00000020/adapter_model.safetensors", b"half")
    assert checkpoints.newest().step == 10
    commit(checkpoints, 30)
    assert names(store) == ["step-00000010", "step-00000030"]


def test_a_commit_that_lost_a_file_is_skipped_and_made_again(checkpoints, store, tmp_path):
    commit(checkpoints, 10)
    commit(checkpoints, 20)
    store.put("step-00000020/adapter_model.safetensors", b"cut")
    assert checkpoints.newest().step == 10
    commit(checkpoints, 20, content=b"again")
    checkpoints.restore(checkpoints.newest(), tmp_path / "back")
    assert (tmp_path / "back/adapter_model.safetensors").read_bytes() == b"again"


def test_a_damaged_file_is_never_restored(checkpoints, store, tmp_path):
    commit(checkpoints, 10, content=b"weights")
    store.put("step-00000010/adapter_model.safetensors", b"WEIGHTS")
    with pytest.raises(StoreError, match=r"step-00000010/adapter_model\.safetensors is damaged"):
        checkpoints.restore(checkpoints.newest(), tmp_path / "back")


def test_a_step_that_an_earlier_attempt_committed_stands(checkpoints, store, tmp_path):
    commit(checkpoints, 10, content=b"first")
    commit(Checkpoints(store, Keep(), retry_seconds=()), 10, content=b"second")
    checkpoints.restore(checkpoints.newest(), tmp_path / "back")
    assert (tmp_path / "back/adapter_model.safetensors").read_bytes() == b"first"


def test_an_upload_that_failed_is_told_once_at_the_next_save_and_then_saving_goes_on(store, tmp_path):
    checkpoints = Checkpoints(store, Keep(), retry_seconds=(0.0,))
    commit(checkpoints, 10)
    (tmp_path / "runs/歌/checkpoints/step-00000020").write_text("a file where the folder should be")
    checkpoints.save(20, {"a": b"x"}, {})
    with pytest.raises(StoreError, match="checkpoint of step 20 could not be uploaded"):
        checkpoints.save(30, {"a": b"x"}, {})
    checkpoints.save(40, {"a": b"x"}, {})
    checkpoints.wait()
    assert checkpoints.newest().step == 40


def test_an_upload_is_tried_again(store):
    tries = []

    def journal_first():
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise StoreError("the store is away")

    checkpoints = Checkpoints(store, Keep(), retry_seconds=(0.0, 0.0))
    checkpoints.save(10, {"a": b"x"}, {}, before=journal_first)
    checkpoints.wait()
    assert len(tries) == 3
    assert checkpoints.newest().step == 10


def test_nothing_is_committed_before_the_journal_is_in_the_store(checkpoints, store):
    seen = []
    checkpoints.save(10, {"a": b"x"}, {}, before=lambda: seen.append(list(store.list())))
    checkpoints.wait()
    assert seen == [[]]

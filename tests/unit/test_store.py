import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.spec.errors import StoreError
from trainer.store import _explain, open_store


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"file://{tmp_path}/倉庫")


def test_objects_come_back_as_they_were_put(store):
    store.put("歌/さくら.txt", "さくら さくら".encode())
    store.put("歌/さくら.txt", "弥生の空は".encode())
    assert store.get("歌/さくら.txt").decode() == "弥生の空は"
    assert store.at("歌").get("さくら.txt") == store.get("歌/さくら.txt")
    assert store.at("歌").url == f"{store.url}/歌"
    assert store.get_or_none("歌/無い") is None
    assert store.exists("歌/さくら.txt")
    assert not store.exists("歌/無い")


def test_reading_a_place_that_is_not_there_does_not_make_it(store):
    assert (store.get_or_none("a"), store.exists("a"), list(store.list()), store.folders()) == (None, False, [], [])
    assert not store.local.exists()


def test_a_relative_url_starts_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("file://./倉庫").put("a", b"1")
    assert (tmp_path / "倉庫" / "a").read_bytes() == b"1"
    assert open_store("file://./倉庫").url == f"file://{tmp_path}/倉庫"


def test_lists_and_folders_are_relative_and_sorted(store):
    for path in ("b/2.bin", "b/1.bin", "b-other/x", "a/deep/歌"):
        store.put(path, path.encode())
    assert [entry.path for entry in store.list()] == ["a/deep/歌", "b-other/x", "b/1.bin", "b/2.bin"]
    assert [(entry.path, entry.bytes) for entry in store.list("b")] == [("b/1.bin", 7), ("b/2.bin", 7)]
    assert [entry.path for entry in store.at("a").list()] == ["deep/歌"]
    assert store.folders() == ["a", "b", "b-other"]
    assert store.at("a").folders() == ["deep"]
    assert [(entry.path, entry.bytes) for entry in store.at("b").files()] == [("1.bin", 7), ("2.bin", 7)]
    assert (store.files(), store.files("無い")) == ([], [])


def test_delete_passes_over_what_is_not_there(store):
    store.put("a/x", b"1")
    store.put("a/y", b"1")
    store.delete(["a/x", "a/nothing", "a/y"])
    assert list(store.list()) == []
    store.put("a/x", b"2")
    assert store.get("a/x") == b"2"


def test_create_leaves_what_is_there(store):
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.get("a") == b"first"


def test_exactly_one_of_many_writers_creates(store):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda writer: store.create("manifest.json", f"歌{writer}".encode()), range(16)))
    assert store.get("manifest.json").decode() == f"歌{won.index(True)}"
    assert sum(won) == 1


_FORK = """
import os
from trainer.store import open_store
store = open_store("file://{folder}")
store.put("歌", b"1")
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
store.get("歌")
"""


def test_a_process_forked_after_the_first_use_is_stopped_rather_than_left_hanging(tmp_path):
    code = _FORK.format(folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "start processes by spawn" in done.stderr


def test_large_files_travel_in_parts_both_ways(store, tmp_path):
    source = tmp_path / "大.bin"
    source.write_bytes(os.urandom(1024) * 33_000)
    store.upload(source, "大.bin")
    store.download("大.bin", tmp_path / "out" / "大.bin")
    assert (tmp_path / "out" / "大.bin").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["大.bin"]


def test_a_failed_download_leaves_nothing(store, tmp_path):
    store.put("a", b"1")
    with pytest.raises(StoreError, match="歌 does not exist"):
        store.download("歌", tmp_path / "out" / "歌")
    assert list(tmp_path.glob("out/*")) == []


def test_what_was_published_is_fetched_with_its_extras(store, tmp_path):
    (tmp_path / "重み.bin").write_bytes(b"weights")
    files = {"重み.bin": tmp_path / "重み.bin", "sub/state.json": b"{}", "empty": b""}
    assert store.publish(files, step=50, 歌="さくら")
    manifest = store.fetch(tmp_path / "out")
    assert (manifest["step"], manifest["歌"]) == (50, "さくら")
    assert manifest == store.manifest()
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(files)
    assert (tmp_path / "out" / "重み.bin").read_bytes() == b"weights"


def test_the_second_publisher_is_told_and_changes_nothing(store, tmp_path):
    assert store.publish({"a": b"first"})
    assert not store.publish({"a": b"second"})
    store.fetch(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"first"


def test_leftovers_of_a_dead_publisher_are_neither_trusted_nor_in_the_way(store, tmp_path):
    store.put("a", b"torn")
    store.put("same", b"same")
    assert store.manifest() is None
    assert store.publish({"a": b"whole", "same": b"same"})
    store.fetch(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"whole"
    assert "path" not in store.manifest()["files"]["same"]


@pytest.mark.parametrize("damage", [b"Whole", b"whol", b""])
def test_a_damaged_object_is_named_and_not_handed_over(store, tmp_path, damage):
    store.publish({"歌.bin": b"whole"})
    store.put("歌.bin", damage)
    with pytest.raises(StoreError, match=r"歌\.bin is damaged: \d bytes .* its manifest says 5 bytes"):
        store.fetch(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "a\\b", "a/\n", "."])
def test_paths_never_leave_their_folder(store, tmp_path, name):
    for act in (lambda: store.get(name), lambda: store.put(name, b""), lambda: store.at(name)):
        with pytest.raises(StoreError, match="is not a path inside a store"):
            act()
    store.put("manifest.json", json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}).encode())
    with pytest.raises(StoreError, match="is not a path inside a store"):
        store.fetch(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", "歌".encode("shift-jis")])
def test_a_manifest_that_is_none_is_named(store, content):
    store.put("manifest.json", content)
    with pytest.raises(StoreError, match=r"manifest\.json is not a manifest of utaforge"):
        store.manifest()


@pytest.mark.parametrize("url", ["music", "http://host/x", "s3://", "file://", "s3://key:password@bucket/x"])
def test_what_is_no_store_url_is_refused_without_repeating_passwords(url):
    with pytest.raises(StoreError, match="is not a store") as caught:
        open_store(url)
    assert "password" not in str(caught.value)


def test_a_file_in_the_way_is_explained(store, tmp_path):
    (tmp_path / "歌").write_bytes(b"")
    with pytest.raises(StoreError, match="a file stands where a folder should be"):
        open_store(f"file://{tmp_path}/歌/run").put("a", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_explained(tmp_path):
    (tmp_path / "歌").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="permission was refused"):
        open_store(f"file://{tmp_path}/歌").check_writable()


_FULL_DISK = """
from trainer.spec.errors import StoreError
from trainer.store import open_store
store = open_store("file://{folder}")
store.check_writable()
try:
    store.put("歌", b"x" * 1_000_000)
except StoreError as error:
    print(error)
    raise SystemExit(7)
"""


def test_a_full_disk_is_explained(tmp_path):
    """On a real small file system, where the kernel lets us mount one."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("no mounts of our own here")
    script = _FULL_DISK.format(folder=tmp_path)
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "the disk is full" in done.stdout
    assert "free space there" in done.stdout


def test_every_refusal_of_the_system_has_a_cause_and_a_cure():
    causes = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk is full",
        errno.EROFS: "the place is read-only",
        errno.EACCES: "permission was refused",
        errno.ECONNREFUSED: "the server cannot be reached",
    }
    for number, cause in causes.items():
        error = _explain("write", "file:///歌", OSError(number, "x"))
        assert error.problem == f"cannot write file:///歌: {cause}"
        assert error.cure


def test_secrets_in_a_servers_answer_are_not_repeated(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    answer = "403 <Code>AccessDenied</Code><Message>no AKIDEXAMPLE</Message><StringToSign>deadbeef</StringToSign>"
    text = str(_explain("write", "s3://歌", ValueError(answer)))
    assert "AccessDenied, no …" in text
    assert "AKIDEXAMPLE" not in text
    assert "deadbeef" not in text


def test_a_clock_that_the_store_refuses_is_no_lack_of_rights():
    # https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, as obstore passes it on
    answer = (
        "PermissionDeniedError: 403 Forbidden: <Error><Code>RequestTimeTooSkewed</Code><Message>The difference between "
        "the request time and the current time is too large.</Message></Error>"
    )
    error = _explain("read", "s3://歌", ValueError(answer))
    assert error.problem.startswith("cannot read s3://歌: the clocks differ too much (RequestTimeTooSkewed")
    assert "set this machine's clock" in error.cure


def test_the_clock_of_a_store_is_told_by_what_it_writes_and_nothing_stays(store):
    before = time.time()
    assert before - 2 < store.now() < time.time() + 2
    assert list(store.list()) == []


def test_the_store_is_imported_without_torch_or_numpy():
    code = "import sys, trainer.store; print([m for m in ('torch', 'numpy', 'ray', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

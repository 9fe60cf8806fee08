"""The store and the data path over real HTTP, against an S3 server in a process of its own."""

import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.families.conftest import ace_step_release
from trainer.codecs import open_codec
from trainer.data.dataset import Dataset
from trainer.data.prepare import Tools, prepare_songs
from trainer.families import open_family, recognise
from trainer.families.ace_step.family import AceStepFamily
from trainer.families.ace_step.spec import AceStep
from trainer.families.ace_step.weights import PART, WEIGHTS
from trainer.families.heartmula.spec import HeartMuLa
from trainer.families.heartmula.weights import open_release
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.data import Prepare
from trainer.spec.errors import StoreError, UtaforgeError
from trainer.store import Store, open_store

MUSIC = Path(os.environ.get("UTAFORGE_TEST_MUSIC", Path(__file__).parents[3] / "shared" / "data" / "music"))


@pytest.fixture
def environment(server, monkeypatch) -> None:
    """What a user sets to reach the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")


@pytest.fixture
def store(environment, request) -> Store:
    return open_store(f"s3://music/歌/{request.node.name}")


def test_objects_are_put_listed_read_and_deleted(store):
    for path in ("b/2 さくら%20.bin", "b/1.bin", "a"):
        store.put(path, path.encode())
    assert [entry.path for entry in store.list()] == ["a", "b/1.bin", "b/2 さくら%20.bin"]
    assert store.folders() == ["b"]
    assert store.get("b/2 さくら%20.bin").decode() == "b/2 さくら%20.bin"
    assert store.get_or_none("b/3") is None
    assert not store.exists("b/3")
    store.delete(["a", "b/1.bin", "b/nothing"])
    assert [entry.path for entry in store.at("b").list()] == ["2 さくら%20.bin"]
    store.check_writable()


def test_exactly_one_of_many_writers_creates(store):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda writer: store.create("manifest.json", f"歌{writer}".encode()), range(16)))
    assert sum(won) == 1
    assert store.get("manifest.json").decode() == f"歌{won.index(True)}"


def test_large_files_travel_in_parts_both_ways(store, tmp_path):
    source = tmp_path / "大.bin"
    source.write_bytes(os.urandom(1024) * 40_000)
    store.upload(source, "大.bin")
    store.download("大.bin", tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == source.read_bytes()


def test_publishers_at_once_leave_one_whole_set_of_files(store, tmp_path):
    def publish(writer: int) -> bool:
        return store.publish({f"{name}.bin": f"歌{writer}".encode() for name in "abc"}, writer=writer)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(publish, range(6)))
    assert sum(won) == 1
    manifest = store.fetch(tmp_path / "out")
    assert manifest["writer"] == won.index(True)
    for name in "abc":
        assert (tmp_path / "out" / f"{name}.bin").read_text() == f"歌{manifest['writer']}"


def test_what_lies_in_other_folders_of_a_release_is_copied_when_it_is_asked_for(store, tmp_path, monkeypatch):
    monkeypatch.setenv("UTAFORGE_HOME", str(tmp_path / "家"))
    put(store.at("公開"), ace_step_release(tmp_path / "公開"))
    copies = tmp_path / "家" / "cache" / "weights" / store.at("公開").url.replace("://", "/")
    for inside in ("", f"/{PART}", f"/{PART}/{WEIGHTS}"):
        family = AceStepFamily(AceStep(family="ace_step", pretrained=f"{store.url}/公開{inside}"))
        assert family.network().proj_in is not None
        assert [path.name for path in copies.iterdir()] == [PART]
        assert family._text(["童謡 piano"])[0].shape == (2, 32)
        shutil.rmtree(copies)
    with pytest.raises(UtaforgeError, match=f"there is nothing at {store.url}/無い"):
        AceStepFamily(AceStep(family="ace_step", pretrained=f"{store.url}/無い")).network()


def test_a_tokenizer_in_the_folder_above_the_weights_is_found(store, tmp_path, monkeypatch):
    monkeypatch.setenv("UTAFORGE_HOME", str(tmp_path / "家"))
    family = open_family(HeartMuLa(family="heartmula", pretrained="random:tiny"))
    family.save(family.network(), tmp_path / "公開" / "重み", {})
    (tmp_path / "公開" / "tokenizer.json").write_text("{}")
    put(store, tmp_path / "公開")
    for url in (f"{store.url}/重み", f"{store.url}/重み/model.safetensors"):
        assert open_release(url).file("tokenizer.json").read_text() == "{}"
        assert recognise(url) == {"family": "heartmula"}


def put(store: Store, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())


def test_a_damaged_object_is_found_by_its_hash(store, tmp_path):
    store.publish({"歌.bin": b"whole"})
    store.put("歌.bin", b"Whole")
    with pytest.raises(StoreError, match=r"歌\.bin is damaged"):
        store.fetch(tmp_path / "out")


def test_a_missing_bucket_is_said(environment):
    store = open_store("s3://no-such-bucket/歌")
    for act in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list()), store.check_writable):
        with pytest.raises(StoreError, match=r"the bucket does not exist.*\n.*create it"):
            act()


def test_a_server_out_of_reach_is_said_soon(monkeypatch, environment):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(StoreError, match="the server cannot be reached") as caught:
            open_store("s3://music/歌").get("a")
    assert "verysecret" not in str(caught.value)


_REFUSALS = {
    "wrong-key": (403, "InvalidAccessKeyId"),
    "expired": (400, "ExpiredToken"),
    "forbidden": (403, "AccessDenied"),
}


class _Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does to somebody it does not know or trust, and repeats their key."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        status, code = _REFUSALS[self.path.split("/")[1]]
        body = f"<Error><Code>{code}</Code><Message>AKIDEXAMPLE</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("wrong-key", r"the credentials are wrong or have expired \(InvalidAccessKeyId"),
        ("expired", r"the credentials are wrong or have expired \(ExpiredToken"),
        ("forbidden", r"permission was refused \(AccessDenied"),
    ],
)
def test_a_refusal_is_told_with_its_cause_and_without_the_key(environment, monkeypatch, bucket, message):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        with pytest.raises(StoreError, match=message) as caught:
            open_store(f"s3://{bucket}/歌 401 曲").check_writable()
        refusing.shutdown()
    assert "AKIDEXAMPLE" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.skipif(not MUSIC.is_dir() and "CI" not in os.environ, reason=f"the real songs are not there: {MUSIC}")
def test_real_songs_are_prepared_from_the_store_into_the_store(store, tmp_path):
    for path in sorted(MUSIC.iterdir())[:6]:
        store.upload(path, f"生/{path.name}")
    model = MusicGen(family="musicgen", pretrained="random:tiny")
    spec = Prepare.model_validate({"source": {"type": "folder", "path": f"{store.url}/生"}})
    prepared = prepare_songs(f"{store.url}/資料", Tools(spec, open_codec(model), open_family(model), "musicgen"))
    assert prepared.failures == []

    opened = Dataset.open(f"{store.url}/資料", cache=tmp_path / "cache")
    shard = opened.songs.shards[0]
    codes = [opened.song(song).arrays["codes"].copy() for song in opened.songs.ids]
    assert all(book.shape == (4, frames) for book, frames in zip(codes, opened.songs.frames, strict=True))
    assert any(opened.song(song).tags for song in opened.songs.ids)

    (cached,) = [path for path in (tmp_path / "cache").glob("*.parquet") if path.name.startswith(Path(shard).stem)]
    cached.write_bytes(b"x" * cached.stat().st_size)
    again = Dataset.open(f"{store.url}/資料", cache=tmp_path / "cache")
    assert all((again.song(s).arrays["codes"] == c).all() for s, c in zip(again.songs.ids, codes, strict=True))


def test_ranks_of_one_machine_share_the_copy_of_a_shard(store, tmp_path):
    model = MusicGen(family="musicgen", pretrained="random:tiny")
    spec = Prepare.model_validate({"source": {"type": "demo", "style": "a", "songs": 2}})
    url = f"{store.url}/資料"
    prepare_songs(url, Tools(spec, open_codec(model), open_family(model), "musicgen"))
    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(lambda _: Dataset.open(url, cache=tmp_path / "cache").song("style-a/song-01"), range(4)))
    assert len({song.arrays["codes"].tobytes() for song in ranks}) == 1
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 2

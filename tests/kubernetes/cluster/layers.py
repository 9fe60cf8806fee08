"""Layers of images, put into the cluster's registry without being compressed."""

import hashlib
import json
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import requests

from trainer.spec.errors import ClusterError

from .install import run
from .layout import DOCKER, Layout

CHUNK = 1 << 20
OF_LAYER, OF_BLOB = "v2metadata-by-diffid/sha256", "diffid-by-digest/sha256"
"""Folders of the engine's notes: where a layer was pushed to, and which layer a blob of a registry is."""


def store_layers(layout: Layout, image: str) -> None:
    """Put the layers of an image into the registry, and let Docker's engine know that they are there.

    Its own push compresses them first, with one core: of 5 GB for nine minutes. A push skips what it has a note of and
    finds in the registry (moby v20.10.24, ``distribution/push_v2.go`` and ``distribution/metadata``).

    Args:
        layout: of the cluster.
        image: which the engine has, under the name by which it is to be pushed.

    Raises:
        ClusterError: the engine does not have it.
        requests.HTTPError: the registry does not take it.
    """
    (notes,) = (layout.images / "docker/image").glob("*/distribution")
    docker = (DOCKER, "--host", layout.docker)
    layers = json.loads(run(*docker, "image", "inspect", image))[0]["RootFS"]["Layers"]
    if all((notes / OF_LAYER / layer.removeprefix("sha256:")).exists() for layer in layers):
        return
    name = image.removeprefix(f"{layout.registry}/").rpartition(":")[0]
    with subprocess.Popen([*docker, "save", image], stdout=subprocess.PIPE) as save, requests.Session() as session:
        assert save.stdout
        session.trust_env = False
        with tarfile.open(fileobj=save.stdout, mode="r|") as saved:
            for member in saved:
                if member.isfile() and member.name.endswith("/layer.tar"):
                    content = saved.extractfile(member)
                    assert content
                    layer, blob = _upload(session, f"http://{layout.registry}/v2/{name}", content)
                    _note(notes, f"{layout.registry}/{name}", layer, blob)
    if save.returncode != 0:
        raise ClusterError(f"Docker's engine did not save {image}", "look at its log")


def _upload(session: requests.Session, repository: str, layer: IO[bytes]) -> tuple[str, str]:
    """SHA-256 of a layer, and of the blob that it is in the registry: gzip's format, but stored (RFC 1951, 3.2.4)."""
    bare, blob = hashlib.sha256(), hashlib.sha256()
    stored = zlib.compressobj(level=0, wbits=31)

    def parts() -> Iterator[bytes]:
        while chunk := layer.read(CHUNK):
            bare.update(chunk)
            yield stored.compress(chunk)
        yield stored.flush()

    def hashed() -> Iterator[bytes]:
        for part in filter(None, parts()):  # an empty one would end the request
            blob.update(part)
            yield part

    begun = session.post(f"{repository}/blobs/uploads/")
    begun.raise_for_status()
    sent = session.patch(begun.headers["Location"], data=hashed())
    sent.raise_for_status()
    session.put(sent.headers["Location"], params={"digest": f"sha256:{blob.hexdigest()}"}).raise_for_status()
    return bare.hexdigest(), blob.hexdigest()


def _note(notes: Path, repository: str, layer: str, blob: str) -> None:
    """As the engine writes it after a push."""
    of_layer, of_blob = notes / OF_LAYER / layer, notes / OF_BLOB / blob
    for path in (of_layer, of_blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    of_layer.write_text(json.dumps([{"Digest": f"sha256:{blob}", "SourceRepository": repository, "HMAC": ""}]))
    of_blob.write_text(f"sha256:{layer}")

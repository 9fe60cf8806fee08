"""The object store: ``s3://``, ``gs://`` and ``file://`` alike.

Anything made of several files is published by a manifest with sizes and hashes, put last and put conditionally: its
existence is the commit, and a reader trusts nothing else. Torch-free, so that the launcher can use it.
"""

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import GCSStore, LocalStore, ObjectStore, S3Store

from trainer.spec.errors import StoreError

MANIFEST = "manifest.json"
OUT_OF_REACH = "the server cannot be reached"
"""The cause in a ``StoreError`` that does not say whether the store would take one's keys."""
_CHUNK = 16 * 1024 * 1024
_SINGLE_PUT = 512 * 1024 * 1024
_PARALLEL = 4
_CLIENT_VARIABLES = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT",
)  # fmt: skip
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Entry:
    """An object in a store.

    Attributes:
        path: relative to the store it was listed from.
        bytes: its size.
        modified: when it was last written, seconds since 1970.
    """

    path: str
    bytes: int
    modified: float


def open_store(url: str, variables: Mapping[str, str] | None = None) -> "Store":
    """The store at ``url``; nothing is contacted yet.

    A relative ``file://./path`` starts from the current folder. S3 takes its endpoint from ``AWS_ENDPOINT_URL_S3`` or
    ``AWS_ENDPOINT_URL``, its region (default us-east-1) and credentials from the usual ``AWS_*`` variables; Google
    Storage takes them from its application default credentials.

    Args:
        url: of the store.
        variables: instead of this process's, for S3: to see whether somebody else could use the store, who may reach it
            where this machine does not. So nothing is tried twice or waited for.

    Raises:
        StoreError: ``url`` is no store's URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest:
        return Store(f"file://{Path(rest).resolve()}", "")
    bucket, _, prefix = rest.partition("/")
    if scheme in ("s3", "gs") and re.fullmatch(r"[^/@:?#]+", bucket):
        return Store(f"{scheme}://{bucket}", "", variables).at(prefix.strip("/"))
    raise StoreError(
        f"{_public(url)!r} is not a store",
        "write s3://bucket/prefix, gs://bucket/prefix, file:///path or file://./path",
    )


class Store:
    """A place in an object store. Every method raises ``StoreError`` with a cause and a cure when the store fails.

    Paths are relative, use ``/``, and never leave the place.

    Args:
        root: ``scheme://bucket``, or ``file://`` and an absolute folder.
        prefix: the place below it; ``""`` for the root itself.
        variables: see ``open_store``.
    """

    def __init__(self, root: str, prefix: str, variables: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._prefix = prefix
        self._variables = variables

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def url(self) -> str:
        """Where this is; ``file://`` URLs are absolute."""
        return f"{self._root}/{self._prefix}" if self._prefix else self._root

    @property
    def local(self) -> Path | None:
        """The folder behind a ``file://`` store, else None."""
        return Path(self.url.removeprefix("file://")) if self._root.startswith("file://") else None

    def at(self, path: str) -> "Store":
        """The place ``path`` below this one."""
        return Store(self._root, self._key(path), self._variables) if path else self

    def get(self, path: str) -> bytes:
        """The object's content; an object that is not there is a ``StoreError``."""
        data = self.get_or_none(path)
        if data is None:
            raise self._missing(path)
        return data

    def get_or_none(self, path: str) -> bytes | None:
        """The object's content, or None if it is not there."""
        with self._explained("read", path) as key:
            try:
                return bytes(obstore.get(self._client(), key).bytes())
            except FileNotFoundError as error:
                _check_bucket(error)
                return None

    def part(self, path: str, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end`` (exclusive) of an object; one that is not there is a ``StoreError``."""
        with self._explained("read", path) as key:
            try:
                return bytes(obstore.get_range(self._client(), key, start=begin, end=end))
            except FileNotFoundError:
                raise self._missing(path) from None

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        with self._explained("read", path) as key:
            try:
                obstore.head(self._client(), key)
            except FileNotFoundError as error:
                _check_bucket(error)
                return False
            return True

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whole or not at all, over what may be there."""
        with self._explained("write", path) as key:
            obstore.put(self._client(writing=True), key, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object if there is none: exactly one of many writers wins.

        Returns:
            False if there was one already; it stays as it is.
        """
        return self._create(path, data)

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly below the folder ``prefix``, sorted; none if it is not there."""
        found = self._directly_below(prefix)["common_prefixes"]
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def files(self, prefix: str = "") -> "list[Entry]":
        """The objects directly in the folder ``prefix``, sorted by path; none if it is not there."""
        found = self._directly_below(prefix)["objects"]
        return [self._entry(item) for item in sorted(found, key=lambda item: item["path"])]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object below the folder ``prefix``, sorted by path; none if it is not there."""
        with self._explained("list", prefix.rstrip("/")) as key:
            try:
                pages = obstore.list(self._client(), key or None, chunk_size=1000)
                found = [item for page in pages for item in page]
            except FileNotFoundError as error:
                _check_bucket(error)
                return
        for item in sorted(found, key=lambda item: item["path"]):
            yield self._entry(item)

    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""
        keys = [self._key(path) for path in paths]
        with self._explained("delete from", ""):
            client = self._client(writing=True)
            if not isinstance(client, LocalStore):
                obstore.delete(client, keys)
                return
            for key in keys:
                try:
                    obstore.delete(client, key)
                except FileNotFoundError:
                    continue

    def upload(self, local: Path, path: str) -> None:
        """Copy the file ``local`` to the object ``path``, in parts if it is large; readers see all of it or nothing."""
        with self._explained("write", path) as key:
            obstore.put(self._client(writing=True), key, local, chunk_size=_CHUNK, max_concurrency=_PARALLEL)

    def download(self, path: str, local: Path) -> None:
        """Copy the object ``path`` to the file ``local``, in parallel parts; ``local`` appears whole or not at all."""
        part = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.part")
        with self._explained("read", path) as key:
            try:
                client = self._client()
                head = obstore.head(client, key)
            except FileNotFoundError:
                raise self._missing(path) from None

            def copy(start: int) -> None:
                end = min(start + _CHUNK, head["size"])
                data = obstore.get(client, key, options={"range": (start, end), "if_match": head["e_tag"]}).bytes()
                with part.open("r+b") as file:
                    file.seek(start)
                    file.write(data)

            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.touch()
                _in_parallel(copy, range(0, head["size"], _CHUNK))
                part.replace(local)
            finally:
                part.unlink(missing_ok=True)

    def publish(self, files: Mapping[str, Path | bytes], manifest: str = MANIFEST, **extra: Any) -> bool:
        """Upload ``files`` and commit them by their manifest.

        The manifest is ``{"files": {name: {"bytes", "sha256"}}, **extra}``, created conditionally after every file is
        in place. A file that would replace a different one (of a publisher at work, or of one that died) is put aside
        as ``<hash>-<name>``, and the manifest says so under ``path``: what is committed never changes afterwards.

        Returns:
            False if somebody else published first; nothing that is committed has been touched.
        """
        if self.exists(manifest):
            return False
        placed = _in_parallel(lambda item: self._place(*item), files.items())
        content = {"files": dict(zip(files, placed, strict=True)), **extra}
        return self.create(manifest, json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True).encode())

    def manifest(self, name: str = MANIFEST) -> dict[str, Any] | None:
        """What has been published here, or None if nothing has."""
        data = self.get_or_none(name)
        if data is None:
            return None
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
            raise StoreError(
                f"{self.url}/{name} is not a manifest of utaforge", "restore it, or publish again elsewhere"
            )
        return content

    def fetch(self, into: Path, manifest: str = MANIFEST) -> dict[str, Any]:
        """Download everything that was published here into the folder ``into``, each file checked by size and hash.

        Returns:
            The manifest.

        Raises:
            StoreError: nothing was published, a name leaves the folder, or an object is not what the manifest says.
        """
        content = self.manifest(manifest)
        if content is None:
            raise self._missing(manifest)
        files: dict[str, dict[str, Any]] = content["files"]
        for name in files:
            _checked(name)
        _in_parallel(lambda item: self.fetch_file(*item, into / item[0]), files.items())
        return content

    def fetch_file(self, name: str, entry: Mapping[str, Any], local: Path) -> None:
        """Download one file of a manifest (its ``name`` and ``entry`` there) to ``local``, checked by size and hash."""
        path = str(entry.get("path", name))
        partial = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.unchecked")
        self.download(path, partial)
        try:
            with self._explained("read", path):
                size, digest = partial.stat().st_size, _sha256(partial)
                if (size, digest) != (entry["bytes"], entry["sha256"]):
                    raise StoreError(
                        f"{self.url}/{path} is damaged: {size} bytes with sha256 {digest[:12]}…, "
                        f"its manifest says {entry['bytes']} bytes with {str(entry['sha256'])[:12]}…",
                        "restore this object from a copy, or delete it together with its manifest and make it again",
                    )
                partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Put and delete a probe object, so that a store that refuses is found before work starts."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.put(probe, b"utaforge")
        self.delete([probe])

    def now(self) -> float:
        """The store's own clock, seconds since 1970: what it says of an object that is written and removed for that."""
        probe = f".clock-{uuid.uuid4().hex}"
        self.put(probe, b"")
        with self._explained("read", probe) as key:
            written = obstore.head(self._client(), key)["last_modified"]
        self.delete([probe])
        return written.timestamp()

    def _client(self, writing: bool = False) -> ObjectStore:
        folder = Path(self._root.removeprefix("file://")) if self._root.startswith("file://") else None
        if folder is not None and writing:
            folder.mkdir(parents=True, exist_ok=True)
        elif folder is not None and not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
        assert _first_user() == os.getpid(), "obstore's threads do not survive a fork: start processes by spawn"
        own = self._variables is None
        told = os.environ if self._variables is None else self._variables
        return _connect(self._root, tuple(told.get(name) for name in _CLIENT_VARIABLES), own)

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{_checked(path)}" if self._prefix else _checked(path)

    def _directly_below(self, prefix: str) -> Any:
        with self._explained("list", prefix.rstrip("/")) as key:
            try:
                return obstore.list_with_delimiter(self._client(), key or None)
            except FileNotFoundError as error:
                _check_bucket(error)
                return {"common_prefixes": [], "objects": []}

    def _entry(self, item: Any) -> Entry:
        return Entry(self._relative(item["path"]), item["size"], item["last_modified"].timestamp())

    def _relative(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key

    def _place(self, name: str, data: Path | bytes) -> dict[str, Any]:
        with self._explained("read the local file for", name):
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            digest = _sha256(data)
        entry = {"bytes": size, "sha256": digest}
        if self._create(name, data) or self._holds(name, size, digest):
            return entry
        folder, slash, last = name.rpartition("/")
        aside = f"{folder}{slash}{digest[:16]}-{last}"
        if isinstance(data, bytes):
            self.put(aside, data)
        else:
            self.upload(data, aside)
        return {**entry, "path": aside}

    def _create(self, path: str, data: Path | bytes) -> bool:
        if isinstance(data, Path) and data.stat().st_size > _SINGLE_PUT:  # multipart uploads know no condition
            if self.exists(path):
                return False
            self.upload(data, path)
            return True
        with self._explained("write", path) as key:
            try:
                obstore.put(self._client(writing=True), key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

    def _holds(self, path: str, size: int, digest: str) -> bool:
        found = hashlib.sha256()
        with self._explained("read", path) as key:
            result = obstore.get(self._client(), key)
            if result.meta["size"] != size:
                return False
            for chunk in result.stream(min_chunk_size=_CHUNK):
                found.update(chunk)
        return found.hexdigest() == digest

    def _missing(self, path: str) -> StoreError:
        return StoreError(f"{self.url}/{path} does not exist", "check the URL")

    @contextmanager
    def _explained(self, doing: str, path: str) -> Iterator[str]:
        """Gives the client's key of ``path``; the client's errors become ours."""
        key = self._key(path) if path else self._prefix
        try:
            yield key
        except (BaseError, OSError, ValueError) as error:
            # Not chained: servers repeat keys and signatures in what they answer.
            raise _explain(doing, f"{self._root}/{key}".rstrip("/"), error) from None


@cache
def _first_user() -> int:
    return os.getpid()


@lru_cache(maxsize=64)
def _connect(root: str, variables: tuple[str | None, ...], own: bool) -> ObjectStore:
    scheme, _, place = root.partition("://")
    retries: Any = {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    options: Any = {"connect_timeout": "5s", "timeout": "120s"}
    if scheme == "file":
        return LocalStore(place, automatic_cleanup=True)
    if scheme == "gs":
        return GCSStore(place, client_options=options, retry_config=retries)
    endpoint, other_endpoint, region, default_region, key, secret, token, *_ = variables
    config: Any = {"region": region or default_region or "us-east-1"}
    if endpoint := endpoint or other_endpoint:
        config["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    if own:
        return S3Store(place, config=config, client_options=options, retry_config=retries)
    keys: Any = {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
    options |= {"connect_timeout": "3s", "timeout": "10s"}
    return S3Store(
        place, config=config, client_options=options, retry_config={"max_retries": 0}, credential_provider=lambda: keys
    )


def _in_parallel(work: Callable[[T], U], items: Iterable[T]) -> list[U]:
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(work, items))


def _checked(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or re.search(r"[\x00-\x1f]", path):
        raise StoreError(
            f"{path!r} is not a path inside a store", "use a relative path of plain names with '/' between them"
        )
    return path


def _sha256(data: Path | bytes) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_bucket(error: FileNotFoundError) -> None:
    """Raise ``error`` again if it is the bucket that is missing, not the object."""
    if "NoSuchBucket" in str(error):
        raise error


_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"NoSuchBucket|bucket does not exist",
        "the bucket does not exist",
        "create it, or correct the bucket's name or AWS_ENDPOINT_URL",
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|TokenRefreshRequired|Unauthenticated"
        r"|401 Unauthorized",
        "the credentials are wrong or have expired",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (gs: GOOGLE_APPLICATION_CREDENTIALS) to valid ones",
    ),
    (
        r"169\.254\.169\.254|metadata\.google|169\.254\.170\.2|CredentialsError|MissingCredentials",
        "no credentials were found",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (gs: GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        r"RequestTimeTooSkewed",
        "the clocks differ too much",
        "set this machine's clock (timedatectl set-ntp true; in a pod: the node's), or the server's if that is wrong",
    ),
    (
        r"os error (13|1)\b|PermissionDenied|AccessDenied|403 Forbidden|Permission denied",
        "permission was refused",
        "give this user (or these credentials) the right to read and write there",
    ),
    (r"os error (28|122)\b|No space left|507 ", "the disk is full", "free space there, or choose another place"),
    (r"os error 30\b|Read-only file system", "the place is read-only", "choose a place that can be written to"),
    (
        r"os error (17|20|21)\b|Not a directory|Is a directory|File exists",
        "a file stands where a folder should be, or the other way round",
        "move it away, or choose another place",
    ),
    (
        r"error sending request|error trying to connect|dns error|timed out|os error 1(01|10|11|13)\b",
        OUT_OF_REACH,
        "check AWS_ENDPOINT_URL and the network, and that the server runs",
    ),
    (
        r"SlowDown|429 |500 Internal|502 |503 |504 ",
        "the server is overloaded or broken",
        "try again in a moment; the store's own status page may say more",
    ),
    (r"412 Precondition|Precondition", "it changed while it was read", "try again"),
)


def _explain(doing: str, url: str, error: Exception) -> StoreError:
    """What went wrong, told from a client's error without repeating anything secret in it."""
    text = f"{type(error).__name__} {error} {f'os error {error.errno}' if isinstance(error, OSError) else ''}"
    for pattern, cause, cure in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            return StoreError(f"cannot {doing} {url}: {cause}{_details(text)}", cure)
    if isinstance(error, FileNotFoundError):
        return StoreError(f"cannot {doing} {url}: it does not exist", "check the URL")
    return StoreError(
        f"cannot {doing} {url}: {_public(str(error).splitlines()[0][:300])}", "check the URL and the store"
    )


def _details(text: str) -> str:
    code, message = re.search(r"<Code>(\w+)</Code>", text), re.search(r"<Message>([^<]*)</Message>", text)
    address = re.search(r"https?://[^\s/?]+", text)
    found = [match.group(match.lastindex or 0) for match in (code, message, address) if match]
    return f" ({_public(', '.join(found))})" if found else ""


def _public(text: str) -> str:
    """``text`` without passwords in URLs and without the values of secret variables."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if value := os.environ.get(name):
            text = text.replace(value, "…")
    return re.sub(r"://[^/@\s]*@", "://…@", text)

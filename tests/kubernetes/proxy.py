"""A proxy before an API server: it sees what the launcher asks for, and on a bad day it spoils every third answer."""

import base64
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import requests

BAD_DAY = ("overloaded", "broken", "dropped")
"""429 and 500 instead of doing it; and no answer at all, though it was done."""


class Proxy(ThreadingHTTPServer):
    """Listens on the loopback.

    Args:
        server: the real one.
        ca: file of the certificates that it is known by.
        faults: what goes wrong, in turn, with every third request.

    Attributes:
        asked: method and path, with its query, of every request.
        spoilt: how often there was each fault.
    """

    daemon_threads = True

    def __init__(self, server: str, ca: Path, faults: Sequence[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_url, self.session = server, requests.Session()  # a connection for each request costs both ends
        self.session.verify, self.session.trust_env = str(ca), False
        self.asked: set[tuple[str, str]] = set()
        self.spoilt = dict.fromkeys(faults, 0)
        self._faults = itertools.cycle([None, *(each for fault in faults for each in (None, fault, None))])
        self._lock = Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_of(self, method: str, path: str) -> str | None:
        """What goes wrong with this request."""
        with self._lock:
            self.asked.add((method, path))
            fault = next(self._faults)
            if fault:
                self.spoilt[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _answer(self) -> None:
        fault = self.server.fault_of(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "overloaded":
            self._send(429, b'{"message": "too many requests"}')
        elif fault == "broken":
            self._send(500, b'{"message": "etcdserver: request timed out"}')
        else:
            told = self._asked_of_the_real_one(body)
            if told is not None and fault != "dropped":
                self._send(told.status_code, told.content)

    def _asked_of_the_real_one(self, body: bytes) -> requests.Response | None:
        wanted = {name: self.headers[name] for name in ("Authorization", "Content-Type", "Accept")}
        try:
            return self.server.session.request(
                self.command,
                self.server.server_url + self.path,
                data=body,
                headers={name: value for name, value in wanted.items() if value},
                timeout=60,
            )
        except requests.ConnectionError:
            return None

    def _send(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = do_PATCH = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def through_a_proxy(kubeconfig: Path, folder: Path, faults: Sequence[str] = ()) -> Iterator[tuple[Proxy, Path]]:
    """A proxy before the cluster of ``kubeconfig``, and a kubeconfig, written into ``folder``, that leads to it."""
    config = json.loads(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    ca = folder / "ca.crt"
    ca.write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
    with Proxy(cluster["server"], ca, faults) as proxy:
        config["clusters"][0]["cluster"] = {"server": proxy.url}
        path = folder / "proxy.kubeconfig"
        path.write_text(json.dumps(config))
        thread = Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy, path
        finally:
            proxy.shutdown()
            thread.join()

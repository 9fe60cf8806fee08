"""An API server as it is on a bad day: a proxy before the real one that spoils every third answer."""

import base64
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import requests

FAULTS = ("overloaded", "broken", "dropped")
"""429 and 500 instead of doing it; and no answer at all, though it was done."""


class Proxy(ThreadingHTTPServer):
    """Listens on the loopback.

    Args:
        server: the real one.
        ca: file of the certificates that it is known by.

    Attributes:
        spoilt: how often there was each fault.
    """

    daemon_threads = True

    def __init__(self, server: str, ca: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_url, self.ca = server, str(ca)
        self.spoilt = dict.fromkeys(FAULTS, 0)
        self._faults = itertools.cycle((None, None, FAULTS[0], None, None, FAULTS[1], None, None, FAULTS[2]))
        self._lock = Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        """What goes wrong with this request."""
        with self._lock:
            fault = next(self._faults)
            if fault:
                self.spoilt[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _answer(self) -> None:
        fault = self.server.next_fault()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "overloaded":
            self._send(429, b'{"message": "too many requests"}')
        elif fault == "broken":
            self._send(500, b'{"message": "etcdserver: request timed out"}')
        else:
            wanted = {name: self.headers[name] for name in ("Authorization", "Content-Type", "Accept")}
            told = requests.request(
                self.command,
                self.server.server_url + self.path,
                data=body,
                headers={name: value for name, value in wanted.items() if value},
                verify=self.server.ca,
                timeout=60,
            )
            if fault != "dropped":
                self._send(told.status_code, told.content)

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
def on_a_bad_day(kubeconfig: Path, folder: Path) -> Iterator[tuple[Proxy, Path]]:
    """A proxy before the cluster of ``kubeconfig``, and a kubeconfig, written into ``folder``, that leads to it."""
    config = json.loads(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    ca = folder / "ca.crt"
    ca.write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
    with Proxy(cluster["server"], ca) as proxy:
        config["clusters"][0]["cluster"] = {"server": proxy.url}
        path = folder / "bad-day.kubeconfig"
        path.write_text(json.dumps(config))
        thread = Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy, path
        finally:
            proxy.shutdown()
            thread.join()

"""An HTTP server that answers as told: it stands for an API server, a registry or an object store."""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers what ``answers`` has for a path or ``METHOD path``: of a list the first, the last again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[Answer | None]] = {}
        self.otherwise: Answer = (404, {"message": "not found"})
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.behind = 0.0
        """Seconds that its clock is behind this machine's."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() - self.server.behind)

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if size := int(self.headers.get("Content-Length") or 0):
            read = self.rfile.read(size)
            if self.command == "POST":
                self.server.bodies.append(json.loads(read))
        known = self.server.answers
        answers = known.get(f"{self.command} {path}") or known.get(path) or [self.server.otherwise]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:  # the connection breaks
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        code, body = answer
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        if code == 401:
            self.send_header("WWW-Authenticate", f'Bearer realm="{self.server.url}/token",service="uta",scope="pull"')
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"uta"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer

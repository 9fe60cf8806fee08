"""The Ray Jobs API over HTTP, without Ray.

Reference: https://docs.ray.io/en/releases-2.60.0/cluster/running-applications/job-submission/rest.html
"""

import http.client
import json
import logging
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from launcher.backends.base import JobStatus, State
from trainer.spec.errors import ClusterError

if TYPE_CHECKING:
    from websocket import WebSocket

log = logging.getLogger(__name__)
SUBMIT_SECONDS = 120.0
"""How long a cluster may take to accept a program: its agent starts after its dashboard."""
LOST_SECONDS = 30.0
"""How long a cluster may be out of reach before its run counts as lost."""
RETRY_SECONDS = 0.25
READ_SECONDS = 0.5
"""How long the log is waited for before the status is asked again."""
_STATES: Mapping[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobs:
    """``launcher.backends.base.Jobs`` on a Ray dashboard.

    Args:
        address: the dashboard, ``http://host:port``.
        token: of the cluster, if it asks for one; never logged.
        seconds: for one answer.
        environment: variables that programs get, where the cluster's processes do not have them already.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        seconds: float = 60.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._seconds = seconds
        self._environment = dict(environment or {})
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def version(self) -> str:
        """Ray's version; the cheapest sign of life."""
        return str(self._ask("GET", "/api/version")["ray_version"])

    def submit(self, submission: str, argv: Sequence[str]) -> None:
        """See ``Jobs``."""
        body = {
            "submission_id": submission,
            "entrypoint": shlex.join(argv),
            "runtime_env": {"env_vars": self._environment} if self._environment else {},
        }
        begun = time.monotonic()
        while True:
            try:
                self._ask("POST", "/api/jobs/", body)
                return
            except _Refused as error:
                refusal, patience = error, SUBMIT_SECONDS if error.code >= 500 else 0.0
            except ClusterError as error:  # a broken connection tells nothing: it may have been accepted
                refusal, patience = error, LOST_SECONDS
            with suppress(ClusterError):
                if self.status(submission):
                    return
            if time.monotonic() - begun > patience:
                raise refusal
            time.sleep(RETRY_SECONDS)

    def status(self, submission: str) -> JobStatus | None:
        """See ``Jobs``."""
        try:
            told = self._ask("GET", f"/api/jobs/{quote(submission)}")
        except _Refused as refused:
            if refused.code == http.HTTPStatus.NOT_FOUND:
                return None
            raise
        return JobStatus(_STATES[told["status"]], str(told.get("message") or ""), told.get("driver_exit_code"))

    def follow(self, submission: str) -> Iterator[str]:
        """See ``Jobs``."""
        seen, line, reached = 0, "", time.monotonic()
        over = False
        while not over:
            try:
                for text in self._new_text(submission, seen):
                    seen += len(text)
                    *lines, line = (line + text).split("\n")
                    yield from lines
                    reached = time.monotonic()
                over = True
            except ClusterError as error:
                if time.monotonic() - reached > LOST_SECONDS:
                    raise
                log.debug("the log's connection broke and is made again: %s", error.problem)
                time.sleep(RETRY_SECONDS)
        if line:
            yield line

    def stop(self, submission: str) -> None:
        """See ``Jobs``."""
        self._ask("POST", f"/api/jobs/{quote(submission)}/stop")

    def _new_text(self, submission: str, seen: int) -> Iterator[str]:
        """What the log has after ``seen`` characters, until the program is over.

        The tail is for reading along; Ray lets it end seconds after the program, and each connection repeats the log
        from its beginning. So the end is taken from the status, and the rest of the text from the log as a whole.
        """
        told = 0
        with self._tail(submission) as tail:
            while not (status := self.status(submission)) or not status.over:
                text = _received(tail)
                told += len(text)
                if told > seen:
                    yield text[seen - told :]
                    seen = told
        yield str(self._ask("GET", f"/api/jobs/{quote(submission)}/logs")["logs"])[seen:]

    @contextmanager
    def _tail(self, submission: str) -> Generator["WebSocket"]:
        import websocket

        url = f"ws{self.address.removeprefix('http')}/api/jobs/{quote(submission)}/logs/tail"
        try:
            tail = websocket.create_connection(url, timeout=READ_SECONDS, header=self._headers, http_no_proxy=["*"])
            try:
                yield tail
            finally:
                tail.close(timeout=0)
        except (OSError, websocket.WebSocketException) as error:
            raise self._unreachable(error) from None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)  # noqa: S310
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                return cast("dict[str, Any]", json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            raise _Refused(self.address, error.code, error.read().decode("utf-8", "replace")) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ClusterError:
        reason = getattr(error, "reason", None) or error
        return ClusterError(
            f"the Ray cluster at {self.address} does not answer ({reason})",
            "see that it runs; if it has ended, submit again: the run continues at its last checkpoint",
        )


def _received(tail: "WebSocket") -> str:
    """The next piece of the log; nothing if there was none for a while, or if the other side has said all."""
    import websocket

    try:
        received = tail.recv()
    except websocket.WebSocketTimeoutException:
        return ""
    except websocket.WebSocketConnectionClosedException:
        time.sleep(RETRY_SECONDS)
        return ""
    return received if isinstance(received, str) else received.decode("utf-8", "replace")


class _Refused(ClusterError):
    """The cluster answered, with an error."""

    def __init__(self, address: str, code: int, text: str) -> None:
        self.code = code
        lines = text.strip().splitlines()
        token = code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
        super().__init__(
            f"the Ray cluster at {address} refused: {code} {lines[-1] if lines else ''}".rstrip(),
            "give it the right token" if token else "see the cluster's logs; its Ray may be another version than 2.60",
        )

"""Programs that keep running: start them, ask after them, and start again those that died."""

import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainer.spec.errors import ClusterError

from .layout import Layout
from .sandbox import Sandbox, record, recorded

SECONDS_TO_START = 180.0


@dataclass(frozen=True)
class Program:
    """One of the cluster's programs.

    Args:
        name: of its files.
        argv: its command line.
        healthy: says whether it does its work.
        network: whether it lives in the cluster's network, rather than in this machine's.
    """

    name: str
    argv: tuple[str | Path, ...]
    healthy: Callable[[], bool]
    network: bool = True


class Supervisor:
    """Keeps records of what it started, so that another command finds it."""

    def __init__(self, layout: Layout, sandbox: Sandbox) -> None:
        self._layout = layout
        self._sandbox = sandbox
        for folder in ("records", "logs"):
            (layout.state / folder).mkdir(parents=True, exist_ok=True)

    def process(self, program: Program) -> psutil.Process | None:
        """Where it runs."""
        return recorded(self._record(program))

    def start(self, stage: Iterable[Program]) -> list[str]:
        """Start what is not running, wait until all do their work, and give the names of those that were started."""
        stage = list(stage)
        missing = [program for program in stage if not self.process(program)]
        for program in missing:
            self._spawn(program)
        deadline = time.monotonic() + SECONDS_TO_START
        for program in stage:
            while not program.healthy():
                if not self.process(program) or time.monotonic() > deadline:
                    raise ClusterError(f"{program.name} does not start:\n{self._last_words(program)}", "see its log")
                time.sleep(0.1)
        return [program.name for program in missing]

    def _spawn(self, program: Program) -> None:
        argv = self._sandbox.joined(self._sandbox.inside(*program.argv, network=program.network))
        with self._log(program).open("ab") as log:
            process = subprocess.Popen(
                argv,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"GOGC": "400"},  # memory is there to spare, cores are not
            )
        record(self._record(program), process.pid)

    def _record(self, program: Program) -> Path:
        return self._layout.state / "records" / f"{program.name}.json"

    def _log(self, program: Program) -> Path:
        return self._layout.state / "logs" / f"{program.name}.log"

    def _last_words(self, program: Program) -> str:
        lines = self._log(program).read_text(errors="replace").splitlines()[-15:]
        return "\n".join([str(self._log(program)), *lines])


def web(url: str, status: int = 200) -> Callable[[], bool]:
    """Asks a server: an answer of ``status`` means that it is well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # their own certificates; nothing is told to them

    def healthy() -> bool:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(url, timeout=5) as answer:
                return answer.status == status
        except urllib.error.HTTPError as error:
            return error.code == status
        except OSError:
            return False

    return healthy


def command(*argv: str | Path) -> Callable[[], bool]:
    """Asks by a program: its exit code of 0 means that all is well."""
    return lambda: subprocess.run(argv, capture_output=True, check=False).returncode == 0

"""The command ``utaforge`` as people run it, the processes that it starts, and an S3 server."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import boto3
import psutil
import pytest

from tests.waiting import eventually

COMMAND = Path(sys.executable).with_name("utaforge")
COMPILED = Path(__file__).parents[2] / ".utaforge" / "cache" / "torch_extensions"
LONGEST = ["test_rehearse", "test_retrain", "test_resume"]
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that of two at work neither ends long before the other."""
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


@dataclass(frozen=True)
class Said:
    """What a command said, both streams together, and its exit code."""

    code: int
    text: str


class Started:
    """A command at work."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = psutil.Process(process.pid)
        self._popen = process
        self._log = log

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8")

    def until(self, condition: Callable[[], T]) -> T:
        """Wait for ``condition``; fails if the command ends before."""

        def met() -> T:
            value = condition()
            assert value or self._popen.poll() is None, f"the command has ended:\n{self.text}"
            return value

        return eventually(met, 600)

    def end(self, seconds: float = 1200) -> Said:
        """Wait for its end."""
        return Said(self._popen.wait(seconds), self.text)

    def interrupt(self) -> Said:
        """Ctrl-C, then wait for its end."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def below(self, *parts: str) -> list[psutil.Process]:
        """Its descendants whose command line holds all ``parts``, those with the lowest number first."""
        found: list[psutil.Process] = []
        for process in self.process.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if all(part in line for part in parts):
                found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def kill_everything(self) -> None:
        """``kill -9`` of the command and of all that descends from it, as a power cut would: none sees another die."""
        stopped: set[psutil.Process] = set()
        while new := {self.process, *self.process.children(recursive=True)} - stopped:
            for process in new:
                _signal(process, signal.SIGSTOP)
            stopped |= new
        for process in stopped:
            _signal(process, signal.SIGKILL)
        self._popen.wait(60)
        psutil.wait_procs(stopped, 60)


class Utaforge:
    """The command ``utaforge``, run in ``folder`` with a home and temporary files of its own below it."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        temporary = folder / "tmp"
        temporary.mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UTAFORGE", "RAY_"))}
        self.environment = {
            "TORCH_EXTENSIONS_DIR": str(COMPILED),
            **inherited,
            "UTAFORGE_HOME": str(self.home),
            "TMPDIR": str(temporary),
            "RAY_worker_niceness": "0",  # else all that tests do beside it starves the ranks
            **(environment or {}),
        }
        self._commands = 0
        _hear_ctrl_c()

    @property
    def mlflow(self) -> str:
        """Address of the tracking store that runs use by default."""
        return f"sqlite:///{self.home}/mlflow.db"

    def start(self, *arguments: str) -> Started:
        """Start a command and return at once."""
        self._commands += 1
        log = self.folder / f"command-{self._commands}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(COMMAND), *arguments],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Started(process, log)

    def __call__(self, *arguments: str) -> Said:
        """Run a command to its end."""
        return self.start(*arguments).end()

    def output(self, *arguments: str) -> str:
        """Standard output alone of a command that succeeds."""
        done = subprocess.run(
            [str(COMMAND), *arguments], cwd=self.folder, env=self.environment, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def left_running(self) -> list[str]:
        """Command lines of all processes that were started, however indirectly, by commands of this object."""
        found: list[str] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("UTAFORGE_HOME") == str(self.home) and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def end_everything(self) -> None:
        """End what a failed test has left."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("UTAFORGE_HOME") == str(self.home):
                    process.kill()
            except psutil.Error:
                continue


@pytest.fixture(scope="module")
def utaforge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Utaforge]:
    """The command, in a folder that the tests of a module share."""
    command = Utaforge(tmp_path_factory.mktemp("歌"))
    yield command
    command.end_everything()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server with the bucket ``music``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "tests.cluster.s3_server", str(port)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    retries = {"total_max_attempts": 20, "mode": "standard"}
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=boto3.session.Config(retries=retries, connect_timeout=5),
    )
    try:
        client.create_bucket(Bucket="music")
        yield address
    finally:
        process.terminate()
        process.wait()
        log.close()


def _hear_ctrl_c() -> None:
    """A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.

    Not by ``preexec_fn``: a true fork ends OpenBLAS's threads, and whoever computes beside it waits for them for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return

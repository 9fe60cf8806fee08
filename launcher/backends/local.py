"""A Ray cluster on this machine's loopback, started for one run and ended with it."""

import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.base import Backend, Say
from launcher.backends.ray_jobs import RayJobs
from trainer.spec.errors import ClusterError

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0
END_SECONDS = 30.0
POLL_SECONDS = 0.05
STARTS = 3
"""How often Ray is started: it gives its own processes 30 s, which can be too few on a busy machine."""
STARTED = "Ray runtime started."
"""What ``ray start`` says once its processes are up."""
OBJECT_STORE_BYTES = 128 << 20
"""Ray Train sends little through it; songs and weights never."""
DISK_BYTES = 1 << 30
_PORTS = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--runtime-env-agent-port",
)
"""Those that Ray's agents listen on too: what they choose themselves Ray waits for, 15 s, and then it ends."""
_PORT_RANGE = range(20_000, 32_000)
"""Below what Linux gives to outgoing connections, which would take a free port away again."""
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray replaces 127.0.0.1 by the host's address and listens there
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line printed by a rank arrives twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; it costs 7 s of CPU at the start
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_agent_register_timeout_ms": "180000",  # as long as START_SECONDS: Ray's own 30 s end it on a busy machine
    "PYTHONUTF8": "1",  # Ray reads its logs in the locale's encoding
    "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # small /dev/shm, as in containers
}


class LocalBackend(Backend):
    """Ray in processes of this machine, reachable from this machine only, and by token.

    Args:
        ranks: workers that will train, one CPU slot each.
        gpus: that they need; 0 hides this machine's GPUs from them.
        environment: variables for all processes of the cluster, beside those inherited.
    """

    name = "local"

    def __init__(self, ranks: int, gpus: int = 0, environment: Mapping[str, str] | None = None) -> None:
        self._ranks = ranks
        self._gpus = gpus
        self._environment = dict(environment or {})
        self._keeper: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def start(self, say: Say) -> RayJobs:
        """See ``Backend``; about 8 seconds on 2 cores."""
        ray = Path(sys.executable).with_name("ray")
        if not ray.is_file():
            raise ClusterError(f"Ray is not installed beside {sys.executable}", "run: make setup")
        _check_disk()
        self._check_gpus()
        say("starting Ray on this machine")
        for _ in range(STARTS - 1):
            try:
                return self._begin(ray)
            except _Ended as ended:
                log.debug("%s", ended.problem)
                say("Ray ended while starting; starting it once more")
        return self._begin(ray)

    def close(self) -> None:
        """See ``Backend``; takes about 3 seconds."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"some of the local Ray's processes would not end (keeper {self._keeper.pid})",
                f"look at: pstree -p {self._keeper.pid}",
            ) from None
        self._keeper = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def workers(self) -> list[int]:
        """Process ids of the ranks that train on this cluster now."""
        import psutil

        if self._keeper is None:
            return []
        below = psutil.Process(self._keeper.pid).children(recursive=True)
        return [process.pid for process in below if _title(process).startswith("ray::RayTrainWorker")]

    def _begin(self, ray: Path) -> RayJobs:
        folder = self._folder = Path(tempfile.mkdtemp(prefix="utaforge-", dir="/tmp"))  # short: Ray puts sockets there
        token = secrets.token_hex(32)
        self.token_file = folder / "token"
        self.token_file.touch(0o600)
        self.token_file.write_text(token)
        ports = free_ports(len(_PORTS))
        jobs = RayJobs(f"http://{LOOPBACK}:{ports[1]}", token)
        self._spawn(folder, [str(ray), "start", *self._options(folder, ports)])
        try:
            self._wait(jobs)
        except BaseException:
            self.close()
            raise
        return jobs

    def _options(self, folder: Path, ports: list[int]) -> list[str]:
        return [
            "--head",
            "--block",
            "--disable-usage-stats",
            "--no-monitor",  # the autoscaler, which has nothing to scale here
            f"--node-ip-address={LOOPBACK}",
            f"--dashboard-host={LOOPBACK}",
            *(f"{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--temp-dir={folder / 'ray'}",
            f"--num-cpus={self._ranks}",
            f"--num-gpus={self._gpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]

    def _spawn(self, folder: Path, command: list[str]) -> None:
        keeper = Path(__file__).with_name("keeper.py")
        (folder / "scratch").mkdir()
        environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **_RAY_ENVIRONMENT,
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "TMPDIR": str(folder / "scratch"),  # so that what killed processes leave goes with the cluster
            **self._environment,
        }
        with (folder / "start.log").open("wb") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(keeper), str(folder), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _wait(self, jobs: RayJobs) -> None:
        """Until ``ray start`` says that all is up, which it may be minutes after the dashboard answers, or never."""
        assert self._keeper is not None and self._folder is not None
        deadline = time.monotonic() + START_SECONDS
        with (self._folder / "start.log").open(encoding="utf-8", errors="replace") as log_file:  # the keeper removes it
            told = ""
            while True:
                ended = self._keeper.poll() is not None
                told += log_file.read()
                if ended:
                    raise _Ended(told)
                with suppress(ClusterError):
                    if STARTED in told and jobs.version():
                        return
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"Ray did not come up within {START_SECONDS:.0f} seconds\n{_tail(told)}",
                        "see what keeps this machine busy (utaforge doctor), then submit again",
                    )
                time.sleep(POLL_SECONDS)

    def _check_gpus(self) -> None:
        from launcher.profiles import gpus_here

        if self._gpus and (found := gpus_here()) < self._gpus:
            raise ClusterError(
                f"cluster.profile needs {self._gpus} GPUs and this machine has {found} that nvidia-smi knows",
                "use cluster.profile: cpu, fewer cluster.workers, or a machine that has them",
            )


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on now.

    Raises:
        ClusterError: there are not so many.
    """
    found: list[int] = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                continue
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(
        f"no {count} free ports between {_PORT_RANGE.start} and {_PORT_RANGE.stop}",
        "end some of the programs that listen there",
    )


def _title(process: "psutil.Process") -> str:
    import psutil

    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def _check_disk() -> None:
    free = shutil.disk_usage("/tmp").free  # noqa: S108
    if free < DISK_BYTES:
        raise ClusterError(
            f"the disk of /tmp has {free / 1e9:.1f} GB free; Ray's files need {DISK_BYTES / 1e9:.0f} GB",
            "free some space on that disk",
        )


class _Ended(ClusterError):
    """Ray ended while starting: a port was taken meanwhile, or Ray lost patience with a busy machine."""

    def __init__(self, said: str) -> None:
        super().__init__(
            f"Ray ended while starting\n{_tail(said)}",
            "see what keeps this machine busy (utaforge doctor); the lines above are Ray's own",
        )


def _tail(said: str, lines: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in said.strip().splitlines()[-lines:])

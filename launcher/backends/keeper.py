"""Keeps one child and all that descends from it: when the keeper's standard input closes, everything ends.

``keeper.py FOLDER PROGRAM ARGUMENTS…`` is a process of its own between the launcher and Ray. Its input is a pipe that
only the launcher holds, so it closes however the launcher ends, ``kill -9`` included. Being a subreaper, the keeper
inherits every process that Ray lets go of (Ray starts sessions and process groups of its own), so that its descendants
are exactly the cluster. Afterwards FOLDER is removed. Standard library only: it starts in milliseconds.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_SECONDS = 2.0
LIMIT_SECONDS = 20.0
POLL_SECONDS = 0.1


def main(folder: str, *command: str) -> int:
    """Run ``command`` until it ends or standard input closes; returns its exit status."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, _leave)
    status = 1
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
        status = _watch(child.pid)
    finally:
        _end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    return status


def _leave(*_: object) -> None:
    raise SystemExit(1)


def _watch(child: int) -> int:
    while True:
        ended = _reap()
        if child in ended:
            return os.waitstatus_to_exitcode(ended[child])
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if readable and not os.read(0, 1):
            return 0


def _end_descendants() -> None:
    """TERM, then KILL, again and again until none is left: one may start another meanwhile."""
    started = time.monotonic()
    _signal_all(_descendants(), signal.SIGTERM)
    while left := _descendants():
        waited = time.monotonic() - started
        if waited > LIMIT_SECONDS:
            sys.exit(f"could not end {sorted(left)}")
        if waited > GRACE_SECONDS:
            _signal_all(left, signal.SIGKILL)
        time.sleep(POLL_SECONDS / 2)


def _signal_all(pids: set[int], name: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, name)


def _descendants() -> set[int]:
    _reap()
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    newest = {os.getpid()}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - found
        found |= newest
    return found


def _reap() -> dict[int, int]:
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (pid_status := os.waitpid(-1, os.WNOHANG))[0]:
            ended[pid_status[0]] = pid_status[1]
    return ended


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

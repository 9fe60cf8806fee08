"""The namespaces and control groups that a cluster lives in: with its last process, everything of it is gone."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from trainer.spec.errors import ClusterError

from .layout import Layout

FIXED_FOLDERS = {
    "/etc/docker": "docker-etc",
    "/run/containerd": "containerd-run",
    "/var/lib/kubelet": "kubelet",
    "/var/log/containers": "log-containers",
    "/var/log/pods": "log-pods",
}
"""Folders that the programs insist on, and the cluster's own that are mounted over them for its processes alone."""
BRIDGE_ADDRESS = "02:00:00:75:74:61"
"""Set once: else a bridge has that of a port, which changes as pods come, and packets go astray for half a minute."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")
KERNEL_SETTINGS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
"""What the kubelet changes for the whole machine."""


class Sandbox:
    """A network and a mount namespace, held open by one process that does nothing, and a control group."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    @property
    def anchor(self) -> psutil.Process | None:
        """The process that holds the namespaces open."""
        return recorded(self._layout.state / "anchor.json")

    def open(self, pause: Path) -> None:
        """Make namespaces, bridge, device and control groups. ``pause`` is a program that sleeps."""
        for group in _hierarchies():
            _make_group(group / self._layout.name)
        (_programs_group(self._layout.name)).mkdir(exist_ok=True)
        before = {name: Path("/proc/sys", name).read_text() for name in KERNEL_SETTINGS}
        (self._layout.state / "kernel.json").write_text(json.dumps(before))
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", pause],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # an inherited pipe would keep its reader waiting as long as the cluster lives
        )
        while Path(f"/proc/{process.pid}/exe").resolve() != pause.resolve():
            if process.poll() is not None:
                raise ClusterError("this machine allows no namespaces", "use a machine that gives root all rights")
            time.sleep(0.01)
        record(self._layout.state / "anchor.json", process.pid)
        self._furnish()

    def _furnish(self) -> None:
        layout = self._layout
        script = ["mount --make-rshared /"]
        for fixed, own in FIXED_FOLDERS.items():
            Path(fixed).mkdir(parents=True, exist_ok=True)
            (layout.state / own).mkdir(exist_ok=True)
            script.append(f"mount --bind '{layout.state / own}' {fixed}")
        script += [
            "ip link set lo up",
            f"ip link add cni0 address {BRIDGE_ADDRESS} type bridge",
            f"ip address add {layout.node}/24 dev cni0",
            "ip link set cni0 up",
            f"ip link add uplink master cni0 type veth peer name {layout.device} netns {os.getpid()}",
            "ip link set uplink up",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
        ]
        subprocess.run(self.inside("sh", "-euc", "\n".join(script)), check=True)
        subprocess.run(["ip", "address", "add", f"{layout.address(2)}/24", "dev", layout.device], check=True)
        subprocess.run(["ip", "link", "set", layout.device, "up"], check=True)

    def inside(self, *argv: str | Path, network: bool = True) -> list[str]:
        """``argv`` in the namespaces; without ``network``, in this machine's own network."""
        assert self.anchor
        namespaces = ["--mount", "--net"] if network else ["--mount"]
        return ["nsenter", f"--target={self.anchor.pid}", *namespaces, "--", *map(str, argv)]

    def joined(self, argv: list[str]) -> list[str]:
        """``argv`` in the control group."""
        processes = _programs_group(self._layout.name) / "cgroup.procs"
        return ["sh", "-c", f'echo $$ > {processes} && exec "$@"', "sh", *argv]

    def close(self) -> None:
        """Kill every process, those of pods and images too; the namespaces go with them."""
        groups = [hierarchy / self._layout.name for hierarchy in _hierarchies()]
        while processes := {pid for group in groups for pid in _processes(group)}:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if anchor := self.anchor:
            anchor.kill()
            _gone(anchor)
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                _remove_group(Path(folder))
        if (before := self._layout.state / "kernel.json").exists():
            for name, value in json.loads(before.read_text()).items():
                Path("/proc/sys", name).write_text(value)


def record(path: Path, pid: int) -> None:
    """Write down a process so that it is known again: a number alone may come to belong to another."""
    path.write_text(json.dumps([pid, psutil.Process(pid).create_time()]))


def recorded(path: Path) -> psutil.Process | None:
    """The process that was written down, if it is still alive."""
    try:
        pid, created = json.loads(path.read_text())
        process = psutil.Process(pid)
        alive = process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def _gone(process: psutil.Process) -> None:
    with contextlib.suppress(ChildProcessError):  # not a child, if another command started it
        os.waitpid(process.pid, 0)
    process.wait(30)


def _hierarchies() -> list[Path]:
    """The roots of control groups: one in version 2, one per kind of resource in version 1."""
    if (CONTROL_GROUPS / "cgroup.controllers").exists():
        return [CONTROL_GROUPS]
    return [path for path in CONTROL_GROUPS.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink()]


def _programs_group(name: str) -> Path:
    root = CONTROL_GROUPS if (CONTROL_GROUPS / "cgroup.controllers").exists() else CONTROL_GROUPS / "pids"
    return root / name / "programs"


def _make_group(group: Path) -> None:
    if group.exists():
        return
    group.mkdir()
    for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 starts them empty, and then no process may enter
        if (group / setting).exists() and (group.parent / "cgroup.clone_children").exists():
            (group / setting).write_text((group.parent / setting).read_text())
    if (group / "cgroup.controllers").exists():
        names = (group / "cgroup.controllers").read_text().split()
        (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))


def _processes(group: Path) -> Iterator[int]:
    for folder, _, files in os.walk(group):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                yield from map(int, (Path(folder) / "cgroup.procs").read_text().split())


def _remove_group(group: Path) -> None:
    for _ in range(100):  # the kernel lets go of the last process a moment after it has ended
        try:
            return group.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            time.sleep(0.05)
    return group.rmdir()

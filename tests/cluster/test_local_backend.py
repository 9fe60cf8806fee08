"""The local backend on a real Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.backends.local import STARTS, LocalBackend
from launcher.backends.ray_jobs import RayJobs
from launcher.runs import create_or_resume
from tests.waiting import eventually
from trainer.spec import load_job
from trainer.spec.errors import ClusterError

pytestmark = pytest.mark.ray
JOB = """\
name: demo
store: {store}
model: {{family: musicgen, pretrained: "random:tiny"}}
method: {{type: lora}}
data: {{train: [{{dataset: {store}/songs}}]}}
train: {{steps: 1, batch: {{seconds: 60}}}}
"""
LINES = 60
LOOPBACK = "0100007F"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[LocalBackend, RayJobs]]:
    with LocalBackend(ranks=2, environment={"UTAFORGE_TEST": "さくら"}) as backend:
        yield backend, backend.start(lambda line: None)


def outcome(jobs: RayJobs, name: str, program: str) -> list[str]:
    jobs.submit(name, [sys.executable, "-c", program])
    return list(jobs.follow(name))


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that belong to the cluster in ``folder``, by their environment or arguments."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in text:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return found


def test_a_program_that_succeeds_tells_every_line_and_its_result(cluster: tuple[LocalBackend, RayJobs]) -> None:
    _, jobs = cluster
    program = (
        "import os\n"
        "while 'Running entrypoint' not in open('/dev/stdout').read(): pass\n"  # Ray's own line may come in between
        f"for n in range({LINES}): print(n, os.environ['UTAFORGE_TEST'], 'x' * 3000)\n"
        "print('終わり', end='')"
    )
    lines = outcome(jobs, "succeeds", program)
    told = [line for line in lines if "さくら" in line]
    assert told == [f"{n} さくら {'x' * 3000}" for n in range(LINES)]
    assert lines[-1] == "終わり"
    status = jobs.status("succeeds")
    assert status is not None
    assert (status.state, status.exit_code) == ("succeeded", 0)


def test_a_program_that_fails_is_known_by_its_status_and_exit_code(cluster: tuple[LocalBackend, RayJobs]) -> None:
    _, jobs = cluster
    outcome(jobs, "fails", "raise SystemExit(6)")
    status = jobs.status("fails")
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 6)


def test_a_submission_made_twice_runs_once_and_can_be_stopped(
    cluster: tuple[LocalBackend, RayJobs], tmp_path: Path
) -> None:
    _, jobs = cluster
    program = (
        f"open({str(tmp_path / 'started')!r}, 'a').write('x'); print('here', flush=True); import signal; signal.pause()"
    )
    for _ in range(2):
        jobs.submit("stops", [sys.executable, "-c", program])
    for line in jobs.follow("stops"):
        if line == "here":
            jobs.stop("stops")
    status = jobs.status("stops")
    assert status is not None
    assert status.state == "stopped"
    assert (tmp_path / "started").read_text() == "x"


def test_a_run_at_work_takes_no_second_submit_is_read_along_and_cancelled(
    cluster: tuple[LocalBackend, RayJobs], tmp_path: Path
) -> None:
    backend, jobs = cluster
    path = tmp_path / "demo.yaml"
    path.write_text(JOB.format(store=f"file://{tmp_path}/store"), encoding="utf-8")
    job = load_job(path)
    run = create_or_resume(job, {}).run
    attempt = run.begin_attempt(backend, jobs)
    program = "print('始めます', flush=True); import signal; signal.pause()"
    jobs.submit(attempt.submission, [sys.executable, "-c", program])
    assert run.status().state == "running"
    with pytest.raises(ClusterError, match="run demo is at work already, on "):
        create_or_resume(job, {})
    live = run.live_log()
    assert live is not None
    assert "始めます" in live
    run.cancel()
    assert run.status().state == "stopped"
    assert run.live_log() is None
    assert create_or_resume(job, {}).news == "run demo: starts again, it had no checkpoint"


def test_places_that_ray_train_has_left_taken_are_given_back(cluster: tuple[LocalBackend, RayJobs]) -> None:
    _, jobs = cluster
    program = (
        "import ray; ray.init()\n"
        "from ray.util.placement_group import placement_group as take\n"
        "from trainer.driver.attempt import free_places\n"
        "ray.get(take([{'CPU': 1}, {'CPU': 1}]).ready())\n"
        "free_places()\n"
        "ray.get(take([{'CPU': 1}, {'CPU': 1}]).ready(), timeout=60)\n"
        "print('空いた')"
    )
    assert outcome(jobs, "takes-places", program)[-1] == "空いた"


def test_only_the_token_opens_the_cluster_and_only_on_the_loopback(cluster: tuple[LocalBackend, RayJobs]) -> None:
    backend, jobs = cluster
    assert backend.token_file is not None
    assert backend.token_file.stat().st_mode & 0o077 == 0
    with pytest.raises(ClusterError, match="refused: 40"):
        RayJobs(jobs.address).submit("intruder", ["true"])
    inodes = {target for pid in cluster_pids(backend.token_file.parent) for target in links(pid)}
    addresses = {address for address, inode in listeners() if f"socket:[{inode}]" in inodes}
    assert addresses <= {LOOPBACK, f"0000000000000000FFFF0000{LOOPBACK}"}
    assert LOOPBACK in addresses


def cluster_pids(folder: Path) -> list[Path]:
    return [
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and os.access(entry / "environ", os.R_OK) and os.fsencode(folder) in environ(entry)
    ]


def environ(entry: Path) -> bytes:
    try:
        return (entry / "environ").read_bytes()
    except OSError:
        return b""


def links(pid: Path) -> list[str]:
    """What the process has open."""
    found: list[str] = []
    with suppress(OSError):
        for link in (pid / "fd").iterdir():
            with suppress(OSError):
                found.append(str(link.readlink()))
    return found


def listeners() -> list[tuple[str, str]]:
    """(address in hexadecimal, inode) of listening TCP sockets, IPv4 and IPv6."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [(row[1].split(":")[0], row[9]) for row in rows if row[3] == "0A"]


def test_close_leaves_no_process_and_no_folder(cluster: tuple[LocalBackend, RayJobs]) -> None:
    """Last of those that use the cluster."""
    backend, jobs = cluster
    assert backend.token_file is not None
    folder = backend.token_file.parent
    sleeper = (
        "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True); print('here', flush=True)"
    )
    outcome(jobs, "leaves-one-behind", sleeper)
    assert any(line.startswith("sleep 1000") for line in processes_of(folder))
    backend.close()
    assert processes_of(folder) == []
    assert not folder.exists()
    with pytest.raises(ClusterError, match="does not answer"):
        jobs.status("leaves-one-behind")


def test_killing_the_launcher_ends_its_cluster() -> None:
    program = (
        "import threading\n"
        "from launcher.backends.local import STARTS, LocalBackend\n"
        "backend = LocalBackend(ranks=1)\n"
        "threading.Thread(target=backend.start, args=(lambda line: None,)).start()\n"
        "while not backend.token_file: pass\n"
        "print(backend.token_file.parent, flush=True)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    folder = Path(launcher.stdout.readline().strip())
    assert folder.is_dir()
    eventually(lambda: any("gcs_server" in process for process in processes_of(folder)), 60)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    eventually(lambda: processes_of(folder) == [], 15)
    assert not folder.exists()


def test_ray_that_ends_while_starting_is_started_once_more_then_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho 'OSError: [Errno 98] Address already in use: 127.0.0.1:6379' >&2\nexit 1\n")
    ray.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").symlink_to(Path(sys.prefix) / "bin" / "python")
    told: list[str] = []
    with LocalBackend(ranks=1) as backend, pytest.raises(ClusterError) as caught:
        backend.start(told.append)
    assert told == ["starting Ray on this machine", *["Ray ended while starting; starting it once more"] * (STARTS - 1)]
    assert "Ray ended while starting" in caught.value.problem
    assert "Address already in use: 127.0.0.1:6379" in caught.value.problem
    assert "utaforge doctor" in caught.value.cure

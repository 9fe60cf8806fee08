"""Bring the cluster up, end it, and tell how it is."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.spec.errors import ClusterError

from . import install, volumes
from .configuration import (
    NODE,
    OPERATOR,
    PAUSE_IMAGE,
    REGISTRY_PASSWORD,
    REGISTRY_USER,
    S3_ACCESS_KEY,
    S3_SECRET_KEY,
    operators,
    stages,
)
from .install import CERTIFICATES, Say, alone, run
from .layers import store_layers
from .layout import DOCKER, Layout
from .programs import Program, Supervisor
from .sandbox import Sandbox

ENGINE_PROGRAMS = ("pause",)
KUBERNETES_PROGRAMS = ("kubernetes", "versitygw")
"""What takes longest to build is begun first."""
BASE_IMAGE = "debian:bookworm-slim"
TRUST = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
WORTH_TELLING_SECONDS = 0.5


def up_engine(layout: Layout, say: Say) -> None:
    """Start what images are built and stored with: Docker's engine, and the registry with a base image.

    Raises:
        ClusterError: this machine cannot run a cluster, or a program does not start.
    """
    if reasons := install.obstacles():
        raise ClusterError(f"no cluster can be brought up here: {'; '.join(reasons)}", "set KUBECONFIG to use your own")
    layout.folder.mkdir(parents=True, exist_ok=True)
    with alone(layout.folder / "lock"):
        with alone(install.cache() / "lock"), ThreadPoolExecutor() as pool:
            with _phase("packages", say):
                install.packages(say)
            with _phase("base image", say):
                making = pool.submit(install.base_image, say)
                built = install.programs(ENGINE_PROGRAMS, say)
                base = making.result()
        _link(layout.programs, [*built, Path(DOCKER)])
        sandbox = Sandbox(layout)
        if not sandbox.anchor:
            _end(layout, sandbox)
            for folder in (layout.state, layout.images / "registry"):
                folder.mkdir(parents=True, exist_ok=True)
            sandbox.open(layout.programs / "pause")
        with _phase("etcd, containerd, docker, registry", say):
            Supervisor(layout, sandbox).start(stages(layout)[0])
        with _phase("images", say):
            _push(layout, base, BASE_IMAGE, *(f"ENV {name}={CERTIFICATES}" for name in TRUST), 'CMD ["bash"]')
            _push(layout, _pause_archive(layout), PAUSE_IMAGE, 'ENTRYPOINT ["/pause"]')


def up(layout: Layout, say: Say) -> None:
    """Start what is not running, and return when pods can run; raises as ``up_engine``."""
    up_engine(layout, say)
    with alone(layout.folder / "lock"):
        with _phase("programs", say):
            built = install.programs(KUBERNETES_PROGRAMS, say)
        _link(layout.programs, built)
        _link(layout.docker_config / "cli-plugins", [path for path in built if path.name == "docker-compose"])
        _start_kubernetes(layout, Supervisor(layout, Sandbox(layout)), say)


def down(layout: Layout) -> None:
    """End everything; images stay in the folder for the next time."""
    layout.folder.mkdir(parents=True, exist_ok=True)
    with alone(layout.folder / "lock"):
        _end(layout, Sandbox(layout))


def status(layout: Layout) -> dict[str, str]:
    """Each program's name → how it is."""
    if not Sandbox(layout).anchor:
        return {"cluster": "down"}
    supervisor = Supervisor(layout, Sandbox(layout))

    def state(program: Program) -> str:
        process = supervisor.process(program)
        if not process:
            return "not running"
        return f"{'well' if program.healthy() else 'not well'}, pid {process.pid}"

    return {program.name: state(program) for program in _programs(layout)}


def kill(layout: Layout, name: str) -> None:
    """``kill -9`` of one program, which ``status`` names; ``up`` starts it again."""
    supervisor = Supervisor(layout, Sandbox(layout))
    (program,) = (each for each in _programs(layout) if each.name == name)
    if process := supervisor.process(program):
        process.kill()
        process.wait(30)


def environment(layout: Layout) -> dict[str, str]:
    """Variables by which tests and people reach the cluster."""
    return {
        "PATH": f"{layout.programs}:{os.environ['PATH']}",
        "KUBECONFIG": str(layout.kubeconfig),
        "KUBECACHEDIR": str(layout.state / "kubectl"),
        "DOCKER_HOST": layout.docker,
        "DOCKER_CONFIG": str(layout.docker_config),
        "DOCKER_BUILDKIT": "1",
        "UTAFORGE_TEST_REGISTRY": layout.registry,
        "UTAFORGE_TEST_PRIVATE_REGISTRY": layout.private_registry,
        "UTAFORGE_TEST_REGISTRY_USER": REGISTRY_USER,
        "UTAFORGE_TEST_REGISTRY_PASSWORD": REGISTRY_PASSWORD,
        "UTAFORGE_TEST_IMAGE": f"{layout.registry}/{BASE_IMAGE}",
        "UTAFORGE_TEST_S3": layout.s3,
        "AWS_ENDPOINT_URL": layout.s3,
        "AWS_ACCESS_KEY_ID": S3_ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }


def kubectl(layout: Layout, *arguments: str | Path) -> str:
    """What ``kubectl`` prints."""
    cache = f"--cache-dir={layout.state / 'kubectl'}"
    return run(layout.programs / "kubectl", f"--kubeconfig={layout.kubeconfig}", cache, *arguments)


def _programs(layout: Layout) -> list[Program]:
    return [program for stage in stages(layout) for program in stage] + operators(layout)


def _start_kubernetes(layout: Layout, supervisor: Supervisor, say: Say) -> None:
    servers, controllers = stages(layout)[1:]
    with _phase("API server, S3", say):
        supervisor.start(servers)
    with _phase("Kubernetes", say):
        if not all(supervisor.process(program) for program in controllers):
            _teach_kuberay(layout)  # or else quotas of RayJobs are unknown for half a minute
        supervisor.start(controllers)
    with _phase("KubeRay, kwok", say):
        supervisor.start(operators(layout))
    with _phase("node, volumes", say):
        volumes.renew(layout, functools.partial(kubectl, layout))
        kubectl(layout, "wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=120s")


def _teach_kuberay(layout: Layout) -> None:
    """Until the API server serves KubeRay's objects; what its operator may do."""
    config = layout.programs / "kuberay-manifests"
    kubectl(layout, "apply", "--server-side", "-f", config / "crd/bases", "-f", config / "rbac/role.yaml")
    _apply(layout, _binding())
    served = functools.partial(kubectl, layout, "api-resources", "--api-group=ray.io", "--output=name")
    _until(lambda: "rayjobs.ray.io" in served(), "the API server does not serve KubeRay's objects", "see its log")


def _end(layout: Layout, sandbox: Sandbox) -> None:
    sandbox.close()
    device = Path("/sys/class/net", layout.device)  # the kernel removes it after the last process
    _until(lambda: not device.exists(), f"the device {layout.device} stays", f"ip link delete {layout.device}")
    shutil.rmtree(layout.state, ignore_errors=True)
    for left in (layout.kubeconfig, *layout.folder.glob("*.sock*")):
        left.unlink(missing_ok=True)


def _link(folder: Path, programs: Iterable[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs:
        link = folder / program.name
        if not link.is_symlink() or link.readlink() != program:
            link.unlink(missing_ok=True)
            link.symlink_to(program)


def _pause_archive(layout: Layout) -> Path:
    archive = layout.state / "pause.tar"
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(layout.programs / "pause", "pause")
    return archive


def _push(layout: Layout, archive: Path, name: str, *changes: str) -> None:
    """Put an archive into this cluster's engine and registry, unless it is there."""
    docker = [DOCKER, "--host", layout.docker]
    remote = f"{layout.registry}/{name}"
    if subprocess.run([*docker, "image", "inspect", remote], capture_output=True, check=False).returncode != 0:
        options = [argument for change in changes for argument in ("--change", change)]
        run(*docker, "import", *options, archive, name)
        run(*docker, "tag", name, remote)
    if not (layout.images / "registry/docker/registry/v2/repositories" / name.partition(":")[0]).exists():
        store_layers(layout, remote)
        run(*docker, "push", remote)


def _apply(layout: Layout, manifest: dict[str, object]) -> None:
    path = layout.state / "manifest.json"
    path.write_text(json.dumps(manifest))
    kubectl(layout, "apply", "--server-side", "-f", path)


def _binding() -> dict[str, object]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": OPERATOR},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": OPERATOR},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": OPERATOR}],
    }


def _until(condition: Callable[[], bool], problem: str, cure: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(problem, cure)
        time.sleep(0.05)


@contextlib.contextmanager
def _phase(name: str, say: Say) -> Iterator[None]:
    start = time.monotonic()
    yield
    if (seconds := time.monotonic() - start) >= WORTH_TELLING_SECONDS:
        say(f"{seconds:6.1f} s  {name}")

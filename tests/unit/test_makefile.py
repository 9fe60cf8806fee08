"""What ``make`` says when this machine lacks something."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def _make(folder: Path, *arguments: str, programs: tuple[str, ...] = ()) -> str:
    """What ``make`` prints; with ``programs``, nothing else is on its path."""
    path = folder / "bin"
    path.mkdir()
    for name in programs:
        (path / name).symlink_to(shutil.which(name) or name)
    make = shutil.which("make")
    assert make
    variables = {"PATH": str(path)} if programs else None
    done = subprocess.run([make, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_missing_compiler_is_named_with_its_cure(clone: Path) -> None:
    assert "no C++ compiler (g++) found; install one" in _make(clone, "setup", programs=("bash", "python3"))


def test_an_old_python_is_named_with_its_cure(clone: Path) -> None:
    old = clone / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert "is older than 3.11; name a newer one" in _make(clone, "setup", f"PYTHON={old}")


def test_a_port_in_use_is_named_with_its_cure(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (clone / ".venv" / ".ready").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use; choose another" in _make(clone, "ui", f"PORT={port}")

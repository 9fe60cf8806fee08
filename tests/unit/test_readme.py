"""The README shows the tree as it is: one line a file."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].splitlines()


def test_every_module_has_its_line_and_every_line_its_module() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "launcher", "trainer"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    there = [line for line in listed.stdout.splitlines() if line.endswith(".py") and not line.endswith("__init__.py")]
    told = [path for path in shown() if path.endswith(".py") and path.startswith(("launcher/", "trainer/"))]
    assert sorted(told) == sorted(there)


def shown() -> list[str]:
    """The paths that the tree's indentation spells."""
    paths: list[str] = []
    above: list[str] = []
    for line in TREE:
        name = line.split()[0] if line.strip() else ""
        if not name.endswith(("/", ".py")):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name.rstrip("/")]
        paths.append("/".join(above))
    return paths

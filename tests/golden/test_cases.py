"""Our networks compute what upstream's compute (numbers in cases/, and in ../shared/golden where that lies beside)."""

import os
from pathlib import Path

import pytest

from trainer.families.verify import main, run

HERE = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[3] / "shared" / "golden"


def _cases(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.rglob("case.json"))


@pytest.mark.parametrize("folder", _cases(HERE), ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_outputs_are_upstreams(folder: Path) -> None:
    bad = [line for line in run(folder) if not line.good]
    assert not bad


def test_the_command_passes_every_shared_case_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    if not SHARED.is_dir() and "CI" not in os.environ:
        pytest.skip("../shared/golden is not beside this clone")
    status = main([str(case) for case in _cases(SHARED) if not (HERE / case.relative_to(SHARED)).is_dir()])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "outputs are upstream's" in said

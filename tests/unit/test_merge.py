"""``utaforge merge``: a run's weights as a release, which computes what the run has learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.cli import run as utaforge
from tests.unit.conftest import Learnt
from tests.unit.families.conftest import sung
from trainer.families import open_family
from trainer.families.base import Family
from trainer.merge import main, merge
from trainer.rundir import RunDirectory
from trainer.spec.errors import StoreError
from trainer.spec.families import FAMILIES
from trainer.validation.generate import load

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 12},
    "rslora": {"rank": 4, "alpha": 12, "rslora": True},
    "dora": {"rank": 4, "alpha": 12, "dora": True},
    "pissa": {"rank": 4, "alpha": 12, "pissa": True},
    "full": {"type": "full"},
}
BESIDE = {name: [{"modules": one} for one in FAMILIES[name].train_also] for name in FAMILIES}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("musicgen", method) for method in KINDS.values()),
    *((name, {"rank": 4, "train_also": also}) for name, also in BESIDE.items() if also),
    ("fish_speech", {"preset": "fish-speech/r8a16", "dora": True}),
    ("ace_step", KINDS["full"]),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_merged_release_computes_what_the_run_has_learnt(
    family: str, method: dict[str, Any], learnt: Learnt, tmp_path: Path
) -> None:
    run = learnt(family, **method)
    names = merge(run, f"file://{tmp_path}/合成")
    assert names == sorted(str(path.relative_to(tmp_path / "合成")) for path in files(tmp_path / "合成"))
    base, trained = load(run, "base")[1], load(run, "last")[1]
    release, network = loaded(run, tmp_path / "合成")
    assert network.state_dict().keys() == base.state_dict().keys()
    bare, wanted, found = (sums(run, release, one) for one in (base, trained, network))
    assert difference(found, wanted) <= 1e-5
    assert difference(bare, wanted) > 1e-4


def test_the_command_merges_and_overwrites_nothing(
    learnt: Learnt, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, to = learnt("musicgen", rank=4), f"file://{tmp_path}/合成"
    assert utaforge(["merge", "sakura", "--store", f"file://{tmp_path}", "--to", to, "--step", "10"]) == 0
    assert f"{to}: config.json, model.safetensors" in capfd.readouterr().out
    network = loaded(run, tmp_path / "合成")[1]
    before = {path: path.read_bytes() for path in files(tmp_path / "合成")}
    assert main([run.url, to]) == StoreError.exit_code
    told = capfd.readouterr().err
    assert f"{to} is not empty: it holds config.json" in told and "name a new folder; nothing is overwritten" in told
    assert {path: path.read_bytes() for path in files(tmp_path / "合成")} == before
    wanted = load(run, "last")[1].merge_and_unload().state_dict()  # type: ignore[operator]
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


def test_a_step_that_is_not_there_is_answered_with_those_that_are_and_leaves_nothing(
    learnt: Learnt, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = learnt("musicgen", rank=4)
    assert main([run.url, f"file://{tmp_path}/合成", "--step", "15"]) == StoreError.exit_code
    told = capfd.readouterr().err
    assert "has no checkpoint '15'" in told and "its steps: 10" in told
    assert not files(tmp_path / "合成")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def loaded(run: RunDirectory, folder: Path) -> tuple[Family, nn.Module]:
    """The family that reads the release, configuration included, and its network, strictly loaded."""
    family = open_family(run.job.model.model_copy(update={"pretrained": f"file://{folder}"}))
    return family, family.network()


@torch.no_grad()
def sums(run: RunDirectory, family: Family, network: nn.Module) -> Tensor:
    """Loss sums in evaluation, which draws always the same."""
    batch = open_family(run.job.model).collate(sung(run.job.model), training=False)
    found = family.sums(network.eval(), batch)
    return torch.stack([found[term].double() for term in sorted(family.terms)])


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())

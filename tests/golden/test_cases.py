"""Our networks compute what upstream's compute (numbers in cases/, which are those of ../shared/golden)."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from trainer.families.verify import main, run

HERE = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[3] / "shared" / "golden"


def _cases(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.rglob("case.json"))


@pytest.mark.parametrize("folder", _cases(HERE), ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_outputs_are_upstreams_whatever_the_case_is_called(folder: Path, tmp_path: Path) -> None:
    _tell(tmp_path / "事例", {**_copy(folder, tmp_path / "事例"), "case": "事例"})
    bad = [line for line in run(tmp_path / "事例") if not line.good]
    assert not bad


def test_copies_are_the_shared_cases_byte_for_byte() -> None:
    if not SHARED.is_dir() and "CI" not in os.environ:
        pytest.skip("../shared/golden is not beside this clone")
    assert _cases(SHARED)
    for case in _cases(SHARED):
        for file in case.iterdir():
            assert (HERE / file.relative_to(SHARED)).read_bytes() == file.read_bytes(), file


def test_a_damaged_case_is_named_and_hides_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, damaged = HERE / "ace_step" / "sigmas", HERE / "musicgen" / "delay"
    _copy(good, tmp_path / "a良い")
    _lose(_copied(damaged, tmp_path / "b入力"), "inputs", "text_mask")
    _lose(_copied(damaged, tmp_path / "c出力"), "outputs", "logits")
    (_copied(damaged, tmp_path / "d無し") / "outputs.safetensors").unlink()
    (_copied(damaged, tmp_path / "e切れ") / "inputs.safetensors").write_bytes(b"\0" * 20)
    _tell(tmp_path / "f家族", {**_copy(damaged, tmp_path / "f家族"), "family": "音楽"})
    told = _copy(damaged, tmp_path / "g設定")
    _tell(tmp_path / "g設定", {key: value for key, value in told.items() if key != "tolerance"})
    (_copied(damaged, tmp_path / "h壊れ") / "case.json").write_text("{", encoding="utf-8")
    (_copied(HERE / "fish_speech" / "protos", tmp_path / "i書庫") / "00000000.protos").unlink()
    _copy(good, tmp_path / "z良い")
    assert main([str(tmp_path), str(tmp_path / "空"), str(good)]) == 1
    said = capfd.readouterr()
    assert not said.err
    reasons = {
        "b入力": "text_mask",
        "c出力": "logits",
        "d無し": "outputs.safetensors",
        "e切れ": "",
        "f家族": "音楽",
        "g設定": "tolerance",
        "h壊れ": "",
        "i書庫": "",
        "空": "no case.json",
    }
    bad = [line for line in said.out.splitlines() if line.startswith("BAD case: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in bad] == list(reasons)
    assert all(reason in line for line, reason in zip(bad, reasons.values(), strict=True))
    outputs = len(json.loads((good / "case.json").read_text(encoding="utf-8"))["outputs"])
    assert said.out.splitlines()[-1].endswith("9 of the cases could not be run")
    assert said.out.count("ok  ") == 3 * outputs


def test_an_output_that_upstream_has_otherwise_is_bad(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = _copied(HERE / "ace_step" / "sigmas", tmp_path / "歌") / "outputs.safetensors"
    outputs = load_file(file)
    save_file({**outputs, "sigmas_27": outputs["sigmas_27"] * 1.001}, file)
    assert main([str(tmp_path)]) == 1
    assert [line.split()[2] for line in capfd.readouterr().out.splitlines() if line.startswith("BAD")] == ["sigmas_27"]


def _copy(case: Path, to: Path) -> dict[str, object]:
    """Copies the case; returns its ``case.json``."""
    shutil.copytree(case, to)
    return json.loads((to / "case.json").read_text(encoding="utf-8"))


def _copied(case: Path, to: Path) -> Path:
    _copy(case, to)
    return to


def _tell(case: Path, told: dict[str, object]) -> None:
    (case / "case.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def _lose(case: Path, kind: str, name: str) -> None:
    tensors = load_file(case / f"{kind}.safetensors")
    del tensors[name]
    save_file(tensors, case / f"{kind}.safetensors")

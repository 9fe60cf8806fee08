"""``utaforge doctor --model``: weights and songs that belong together pass, others are told."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import selftest
from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.prepare import Tools, prepare_songs
from trainer.families import open_family
from trainer.spec.data import Prepare
from trainer.spec.model import MusicGen


@pytest.fixture
def songs(tmp_path: Path) -> str:
    """A dataset for the tiny MusicGen."""
    (tmp_path / "歌").mkdir()
    for i in range(2):
        wave = 0.3 * np.sin(np.arange(2 * 16_000) * 0.1 * (i + 1))
        save(tmp_path / "歌" / f"さくら{i}.wav", wave[None].astype(np.float32), 16_000, "wav")
    model = MusicGen(family="musicgen", pretrained="random:tiny")
    spec = Prepare.model_validate({"source": {"type": "folder", "path": str(tmp_path / "歌")}})
    url = f"file://{tmp_path}/資料"
    prepare_songs(url, Tools(spec, open_codec(model), open_family(model), "musicgen"))
    return url


def test_weights_and_songs_that_belong_together_pass(songs: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["random:tiny", songs]) == 0
    told = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [
        f"ok   {name}" for name in ("songs", "weights", "loss", "untrained adapter", "merged adapter")
    ]


def test_an_adapter_that_does_not_merge_fails(
    songs: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def careless(network: torch.nn.Module, *_: object) -> torch.nn.Module:
        adapted = apply(network, *_)
        adapted.merge_and_unload = lambda: adapted.unload()
        return adapted

    apply = selftest.apply
    monkeypatch.setattr(selftest, "apply", careless)
    assert selftest.main(["random:tiny", songs]) == 1
    assert "FAIL merged adapter" in capfd.readouterr().out


def test_what_cannot_be_used_is_told_with_its_cure(songs: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["file:///無い", songs]) == 1
    assert "there is no /無い\n  → name the folder" in capfd.readouterr().err
    assert selftest.main(["random:tiny", f"{songs}-無い"]) == 4
    assert "資料-無い" in capfd.readouterr().err

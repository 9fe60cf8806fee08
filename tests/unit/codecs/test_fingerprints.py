"""A codec's fingerprint reads nothing but what it hashes: every training rank asks for it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from trainer.codecs import firefly, open_codec
from trainer.codecs.dcae import TINY_DCAE, WEIGHTS
from trainer.spec.errors import UtaforgeError
from trainer.spec.families import Model


def codec(family: str, pretrained: str = "random:tiny", name: str | None = None, **weights: str) -> Any:
    told = {"family": family, "pretrained": pretrained, "codec": {"name": name, "weights": weights}}
    return open_codec(TypeAdapter(Model).validate_python(told))


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], book: str) -> None:
    """A release in two shards, of which the one without codebooks is lost."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = {name: f"{1 if name.endswith(book) else 2}.safetensors" for name in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({name: state[name].clone() for name in state if name.endswith(book)}, folder / "1.safetensors")


def test_of_encodec_inside_musicgen_and_of_heartcodec_it_reads_the_shards_with_codebooks(tmp_path: Path) -> None:
    own = codec("musicgen", name="encodec")
    for book in range(own.codebooks):
        own.model.quantizer.layers[book].codebook.embed.normal_()
    state = {f"audio_encoder.{name}": value for name, value in own.model.state_dict().items()}
    config = {"audio_encoder": own._config.to_dict()}
    write(tmp_path / "歌", config, {**state, "decoder.lm_heads.0.weight": torch.ones(1)}, "codebook.embed")
    read = codec("musicgen", f"file://{tmp_path}/歌", "encodec")
    assert read.fingerprint == own.fingerprint
    with pytest.raises(UtaforgeError, match=r"2\.safetensors is named by the index of shards but is not there"):
        _ = read.model

    own = codec("heartmula")
    config = {"model_type": "heartcodec", **asdict(own._config)}
    write(tmp_path / "符号", config, own.network.state_dict(), "_codebook.embed")
    read = codec("heartmula", "file:///歌", heartcodec=f"file://{tmp_path}/符号")
    assert read.fingerprint == own.fingerprint
    write(tmp_path / "空", {**config, "num_quantizers": 9}, own.network.state_dict(), "_codebook.embed")
    with pytest.raises(UtaforgeError, match="空 holds 8 codebooks, this codec has 9"):
        _ = codec("heartmula", "file:///歌", heartcodec=f"file://{tmp_path}/空").fingerprint


def test_of_firefly_it_reads_all_but_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firefly, "FireflyConfig", lambda: firefly.TINY)
    own = codec("fish_speech")
    headless = {name: value for name, value in own.network.state_dict().items() if not name.startswith("head.")}
    torch.save(headless, tmp_path / "声.pth")
    read = codec("fish_speech", "file:///歌", firefly=f"file://{tmp_path}/声.pth")
    assert read.fingerprint == own.fingerprint
    with pytest.raises(UtaforgeError, match=r"missing: head\."):
        _ = read.network


def test_of_dcae_it_builds_no_network(tmp_path: Path) -> None:
    own = codec("ace_step")
    (tmp_path / "config.json").write_text(json.dumps(TINY_DCAE))
    save_file(own.autoencoder.state_dict(), tmp_path / WEIGHTS)
    read = codec("ace_step", "file:///歌", dcae=f"file://{tmp_path}")
    assert read.fingerprint == own.fingerprint
    assert "autoencoder" not in vars(read)

"""MusicGen computes what transformers computes (numbers in cases/musicgen)."""

import json
from pathlib import Path

import pytest
import torch
from golden_weights import fill
from safetensors.torch import load_file

from trainer.families.musicgen.network import MusicGenNetwork
from trainer.families.musicgen.objective import delay
from trainer.families.musicgen.weights import Release

CASE = Path(__file__).parent / "cases" / "musicgen" / "delay"


@pytest.fixture(scope="module")
def case() -> dict:
    return json.loads((CASE / "case.json").read_text())


@pytest.fixture(scope="module")
def network(case: dict) -> MusicGenNetwork:
    text = {"d_model": case["config"]["text_encoder_d_model"]}
    release = Release("golden", None, {"decoder": case["config"]["decoder"], "text_encoder": text})
    network = MusicGenNetwork(release.decoder_config(dropout=0.0), release.text_width)
    network.load_state_dict(fill(network.state_dict()), strict=True)
    return network.eval()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_state_dict_has_upstreams_keys_and_shapes(network: MusicGenNetwork) -> None:
    wanted = json.loads((CASE / "keys.json").read_text())
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == wanted


def test_pattern_logits_and_loss_are_upstreams(network: MusicGenNetwork, case: dict) -> None:
    given, wanted = load_file(CASE / "inputs.safetensors"), load_file(CASE / "outputs.safetensors")
    ids, labels = delay(given["codes"], given["codes_length"], network.pad)
    assert torch.equal(ids, wanted["decoder_input_ids"])
    assert torch.equal(labels, wanted["labels"])
    mask = given["text_mask"].bool()
    tolerance = case["tolerance"]["float"]
    with torch.no_grad():
        logits = network(ids, given["text_hidden"], mask)
        sums = network(ids, given["text_hidden"], mask, labels=labels)
    assert relative(logits, wanted["logits"]) <= tolerance
    assert relative(sums, wanted["ce_sum"]) <= tolerance
    count = int(given["codes_length"].sum()) * len(sums)
    assert relative(sums.sum() / count, wanted["loss"]) <= tolerance

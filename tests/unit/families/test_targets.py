"""Harmful targets are refused however they are spelled, and nothing else is."""

import re
from collections.abc import Iterator

import pytest
from pydantic import TypeAdapter
from torch import nn

from trainer.families import open_family
from trainer.spec.families import FAMILIES, Model

HARMFUL = {
    "musicgen": "",
    "songbloom": r"(nar_dit|block_conv|project_in|project_out|to_timestep_embed)(\..+)?",
    "heartmula": "muq_linear",
    "ace_step": r"projectors\..+|.+\.cross_attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    "fish_speech": "",
}
"""Full names of layers that the facts about a family call harmful, or that never learn."""
THERE = {"musicgen": 0, "songbloom": 16, "heartmula": 1, "ace_step": 14, "fish_speech": 0}
"""How many linear layers of the tiny network they are."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_is_refused_exactly_if_it_names_a_harmful_layer_in_any_spelling(family: str) -> None:
    spec = FAMILIES[family]
    network = open_family(TypeAdapter(Model).validate_python({"family": family, "pretrained": "random:tiny"})).network()
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    harmful = [name for name in layers if re.fullmatch(HARMFUL[family], name)]
    assert len(harmful) == THERE[family]
    refused = {ending for name in harmful for ending in endings(name)}
    for target in {ending for name in layers for ending in endings(name)}:
        assert bool(spec.harm(target)) == (target in refused), target


def test_recipes_that_write_to_q_and_to_kv_are_told_what_is_there_instead() -> None:
    for target in ("to_q", "to_kv", "nar_dit.layers.0.self_attn.to_q"):
        assert "destroyed the vocals" in (FAMILIES["songbloom"].harm(target) or "")
    assert "SongBloom has to_qkv alone" in (FAMILIES["songbloom"].harm("to_kv") or "")
    assert FAMILIES["ace_step"].harm("to_q") is None


def endings(name: str) -> Iterator[str]:
    """``歌.a.b``: itself, ``a.b`` and ``b``."""
    parts = name.split(".")
    yield from (".".join(parts[start:]) for start in range(len(parts)))

"""Adapters between PEFT's file format and upstream's (loralib's).

Both compute ``W + alpha / rank · B A``; for embeddings the transpose. Only the names differ:
``base_model.model.X.lora_A.weight`` is ``X.lora_A``, ``base_model.model.X.lora_embedding_A`` as well.
Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/models/text2semantic/lora.py; loralib 0.1.2.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.families.fish_speech.spec import SPEC
from trainer.spec.errors import UtaforgeError
from trainer.spec.family import matches
from trainer.weights import read_json

UPSTREAM_SCALE = 2
"""Alpha ÷ r in upstream's settings."""
_PEFT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_([AB])|([AB])\.weight)")
_SETTINGS = "fish_speech.models.text2semantic.lora.LoraConfig"
_MERGE = "write whole weights instead: utaforge merge"
_EMBEDDINGS = ("embeddings", "codebook_embeddings", "fast_embeddings")


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter under upstream's names.

    Args:
        state: PEFT's file.

    Raises:
        UtaforgeError: it holds something that is no plain LoRA (DoRA's magnitudes, modules trained in full).
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        found = _PEFT.fullmatch(name)
        if found is None:
            raise UtaforgeError(f"{name} has no place in fish-speech's adapter format", _MERGE)
        renamed[f"{found[1]}.lora_{found[2] or found[3]}"] = value
    return renamed


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter under PEFT's names.

    Args:
        state: upstream's checkpoint: keys without ``lora`` are not the adapter's; ``model.`` may stand before them all.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, matrix = key.removeprefix("model.").rpartition(".lora_")
        if module in _EMBEDDINGS:
            renamed[f"base_model.model.{module}.lora_embedding_{matrix}"] = value
        elif module:
            renamed[f"base_model.model.{module}.lora_{matrix}.weight"] = value
    return renamed


def export_adapter(folder: Path, to: Path, network: nn.Module) -> None:
    """Write PEFT's adapter in ``folder`` as ``to/lora.ckpt``, for upstream's ``tools/llama/merge_lora.py``.

    Its settings, ``to/r_R_alpha_A.yaml``, belong into upstream's ``fish_speech/configs/lora`` and are named to it as
    ``--lora-config r_R_alpha_A``; ``r_8_alpha_16`` is there already. Upstream scales by alpha ÷ r; here alpha is always
    2 r, and what the adapter's own scale is more or less than 2 is in the B matrices. Upstream adapts every layer and
    loads strictly: layers that the adapter leaves alone have zeros.

    Args:
        folder: with PEFT's two files.
        to: is made.
        network: whose layers have the shapes; its weights do not matter.

    Raises:
        UtaforgeError: upstream's format cannot express the adapter.
    """
    config = read_json(folder / "adapter_config.json")
    if config.get("use_dora"):
        raise UtaforgeError("DoRA has no place in fish-speech's adapter format", _MERGE)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    state = {f"{layer}.{matrix}": torch.zeros(shape) for layer, matrix, shape in _matrices(network, rank)}
    for key, value in to_upstream(load_file(folder / "adapter_model.safetensors")).items():
        if key not in state:
            layer = key.rpartition(".")[0]
            raise UtaforgeError(f"{layer} has no place in fish-speech's adapter format", _MERGE)
        state[key] = value * (scale / UPSTREAM_SCALE) if key.endswith("lora_B") else value
    to.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, to / "lora.ckpt")
    alpha = UPSTREAM_SCALE * rank
    settings = {"_target_": _SETTINGS, "r": rank, "lora_alpha": alpha, "lora_dropout": config["lora_dropout"]}
    lines = [f"{name}: {value}\n" for name, value in settings.items()]
    (to / f"r_{rank}_alpha_{alpha}.yaml").write_text("".join(lines), encoding="utf-8")


def _matrices(network: nn.Module, rank: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Layer, matrix and shape of everything that upstream adapts."""
    targets = SPEC.presets["fish-speech/r8a16"].targets
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and any(matches(name, target) for target in targets):
            rows, columns = layer.weight.shape
            inputs, outputs = (rows, columns) if isinstance(layer, nn.Embedding) else (columns, rows)
            yield name, "lora_A", (rank, inputs)
            yield name, "lora_B", (outputs, rank)

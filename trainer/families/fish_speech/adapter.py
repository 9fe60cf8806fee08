"""Adapters between PEFT's file format and upstream's (loralib's).

Both compute ``W + alpha / rank · B A``; for embeddings the transpose. Only the names differ:
``base_model.model.X.lora_A.weight`` is ``X.lora_A``, ``base_model.model.X.lora_embedding_A`` as well.
Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/models/text2semantic/lora.py; loralib 0.1.2.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.spec.errors import UtaforgeError
from trainer.weights import read_json

_PEFT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_([AB])|([AB])\.weight)")
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
            raise UtaforgeError(
                f"{name} has no place in fish-speech's adapter format", "merge the adapter into the weights instead"
            )
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


def export_adapter(folder: Path, file: Path) -> None:
    """Write PEFT's adapter in ``folder`` as a checkpoint for upstream's ``tools/llama/merge_lora.py``.

    Upstream has to be given a LoRA configuration with the adapter's ``r`` and ``lora_alpha`` (``r_8_alpha_16`` fits the
    preset ``fish-speech/r8a16``). It scales by alpha ÷ r; where the adapter has rsLoRA's alpha ÷ √r, the B matrices are
    written √r times as large.

    Raises:
        UtaforgeError: upstream's format cannot express the adapter.
    """
    config = read_json(folder / "adapter_config.json")
    state = to_upstream(load_file(folder / "adapter_model.safetensors"))
    larger = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0
    scaled = {key: value * larger if key.endswith("lora_B") else value for key, value in state.items()}
    torch.save({"state_dict": {f"model.{key}": value for key, value in scaled.items()}}, file)

"""Adapters as upstream's pipeline loads them: the file of diffusers' ``load_lora_adapter``.

Matrices have the names of the network's layers. Nothing in the file tells alpha, and whoever reads it adds ``B A`` as
it is, so that the adapter's scale is in its B matrices (``load_lora``, ``acestep/pipeline_ace_step.py``,
ace-step/ACE-Step@d612523; ``get_peft_kwargs``, ``utils/peft_utils.py``, diffusers 0.42.1).
"""

import math
from pathlib import Path

from safetensors.torch import load_file, save_file

from trainer.spec.errors import UtaforgeError
from trainer.weights import read_json

FILE = "pytorch_lora_weights.safetensors"
"""What upstream looks for in an adapter's folder."""
_PEFT_ROOT = "base_model.model."


def export_adapter(folder: Path, to: Path) -> None:
    """Write PEFT's adapter in ``folder`` as ``to/pytorch_lora_weights.safetensors``, DoRA's magnitudes included.

    Raises:
        UtaforgeError: modules were trained in full beside it, or embeddings adapted, which the format has no place for.
    """
    config = read_json(folder / "adapter_config.json")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    exported = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        key = name.removeprefix(_PEFT_ROOT)
        if ".lora_" not in key or ".lora_embedding_" in key:
            raise UtaforgeError(
                f"{key} has no place in ACE-Step's adapter format: it holds adapted linear layers alone",
                "write whole weights instead: utaforge merge",
            )
        exported[key] = value * scale if key.endswith(".lora_B.weight") else value
    to.mkdir(parents=True, exist_ok=True)
    save_file(exported, to / FILE, {"format": "pt"})

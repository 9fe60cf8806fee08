"""What the optimizer moves, and how fast."""

from typing import Any

from torch import nn

from trainer.spec.model import Lora, Method, Optimizer


def parameter_groups(network: nn.Module, method: Method, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups, each with its ``weight_decay`` and ``lr_scale``.

    Vectors (norms, biases, DoRA's magnitudes) do not decay. With LoRA+ the B matrices learn ``lora_plus`` times as fast
    as the rest (Hayou et al. 2024, https://arxiv.org/abs/2402.12354), those of embeddings too; PEFT's helper
    (``create_loraplus_optimizer``, 0.21.2) has the same rates for linear layers, and a fixed one for embeddings. A
    module of ``method.train_also`` has rate and decay of its own ``optimizer``, if it has one.
    """
    fast = (method.lora_plus if isinstance(method, Lora) else None) or 1.0
    also = method.train_also if isinstance(method, Lora) else ()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            own = next((each.optimizer for each in also if f".{each.modules}." in name), None) or optimizer
            decay = own.weight_decay if parameter.ndim > 1 else 0.0
            scale = own.lr / optimizer.lr
            scale *= fast if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]

"""LoRA through PEFT: put on, saved so that PEFT alone can load it, loaded.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) takes the principal part ``s·B₀A₀`` out of each base weight
and trains on from there. Files are for people whose base is untouched, so they hold the difference ``s·(BA - B₀A₀)``: a
LoRA of twice the rank, ``[B, -B₀]`` by ``[A; A₀]``.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.spec.errors import TrainingError
from trainer.spec.family import FamilySpec
from trainer.spec.model import Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_ROOT = "base_model.model."


def apply(network: nn.Module, method: Lora, family: FamilySpec, *, seed: int = 0) -> PeftModel:
    """Freeze ``network`` and put the adapter of ``method`` on it, in fp32, on the CPU.

    Until it is trained the adapter changes nothing (PiSSA: nothing but rounding). ``seed`` decides its random matrices,
    so that every rank has the same. ``method.train_also``'s modules are trained in full, and saved and loaded with the
    adapter. ``method.init`` is loaded.

    Raises:
        TrainingError: a target or a module is not in the network (those that are there are listed), or a target is of
            a kind that cannot be adapted.
    """
    targets = family.targets(method)
    _check_targets(network, targets, method)
    also = [each.modules for each in method.train_also]
    _check_modules(network, also)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  (any number will do)
        lora_dropout=method.dropout,
        target_modules=list(targets),
        use_dora=method.dora,
        use_rslora=method.rslora,
        modules_to_save=also or None,
        init_lora_weights="pissa_niter_16" if method.pissa else True,  # type: ignore[arg-type]
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(network, config)
    assert isinstance(adapted, PeftModel)
    for _, layer in _pissa_layers(adapted):
        layer.register_buffer("initial_A", _matrix(layer, "A").detach().clone(), persistent=False)
        layer.register_buffer("initial_B", _matrix(layer, "B").detach().clone(), persistent=False)
    if method.init:
        _load_from_store(adapted, method.init)
    return adapted


def adapter_state(network: PeftModel, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU, fp32.

    Args:
        network: with its adapter.
        values: parameters by their name in ``network``, where those in it are sharded or rounded.
    """
    own = dict(values) if values is not None else network.state_dict()
    for name, layer in _pissa_layers(network):
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        own[a] = torch.cat([own[a].cpu(), layer.get_buffer("initial_A").cpu()])
        own[b] = torch.cat([own[b].cpu(), -layer.get_buffer("initial_B").cpu()], 1)
    state = get_peft_model_state_dict(network, state_dict=own, save_embedding_layers=False)
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}


def save_adapter(network: PeftModel, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
    """Write the files from which ``PeftModel.from_pretrained`` loads the adapter onto the bare base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(network, values), folder / WEIGHTS, metadata={"format": "pt"})
    _config_as_saved(network).save_pretrained(str(folder))


def load_adapter(network: PeftModel, folder: Path) -> None:
    """Put the adapter in ``folder`` in the place of the network's own.

    Raises:
        TrainingError: it is of another shape (rank, alpha, targets, kind), or a file is missing.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise TrainingError(f"the adapter in {folder} has no {name}", "name a folder with PEFT's two files")
    found = LoraConfig.from_pretrained(str(folder))
    assert isinstance(found, LoraConfig)
    _check_same(found, _config_as_saved(network), folder)
    state = load_file(folder / WEIGHTS)
    for name, layer in _pissa_layers(network):
        _load_pissa(layer, state, name.removeprefix(_PEFT_ROOT))
    result = set_peft_model_state_dict(network, state)
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        raise TrainingError(
            f"the adapter in {folder} lacks {missing} and has unexpected {result.unexpected_keys}",
            "use an adapter that was trained on this network",
        )


def _check_targets(network: nn.Module, targets: tuple[str, ...], method: Lora) -> None:
    modules = dict(network.named_modules())
    kinds = nn.Linear if method.pissa or method.dora else nn.Linear | nn.Embedding
    for target in targets:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if found and all(isinstance(module, kinds) for module in found):
            continue
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.Linear)} - {*"0123456789"}
        )
        raise TrainingError(
            f"method.targets: the network has no linear layer named {target!r}" if not found
            else f"method.targets: {target!r} is a {type(found[0]).__name__}, not a linear layer",
            f"choose from {', '.join(linear)}, or longer endings of their full names",
        )  # fmt: skip


def _check_modules(network: nn.Module, wanted: list[str]) -> None:
    there = [name for name, _ in network.named_children()]
    for name in wanted:
        if name not in there:
            raise TrainingError(
                f"method.train_also: the network has no module named {name!r}", f"choose from {', '.join(there)}"
            )


def _load_from_store(network: PeftModel, url: str) -> None:
    from trainer.store import open_store

    store = open_store(url)
    with TemporaryDirectory() as folder:
        for name in (CONFIG, WEIGHTS):
            store.download(name, Path(folder) / name)
        load_adapter(network, Path(folder))


def _config(network: PeftModel) -> LoraConfig:
    config = network.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return config


def _config_as_saved(network: PeftModel) -> LoraConfig:
    saved = LoraConfig(**{**_config(network).to_dict(), "inference_mode": True, "runtime_config": None})
    saved.target_modules = sorted(saved.target_modules or [])  # type: ignore[assignment]  (PEFT keeps a set)
    if _is_pissa(network):
        saved.lora_alpha *= math.sqrt(2) if saved.use_rslora else 2  # type: ignore[assignment]
        saved.r, saved.init_lora_weights = 2 * saved.r, True
    return saved


def _check_same(found: LoraConfig, wanted: LoraConfig, folder: Path) -> None:
    for field in ("r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora"):
        one, other = getattr(found, field), getattr(wanted, field)
        if field in ("target_modules", "modules_to_save"):
            one, other = sorted(one or []), sorted(other or [])
        if one != other:
            raise TrainingError(
                f"the adapter in {folder} has {field} = {one}, the job's method asks for {other}",
                "set method to what the adapter was trained with",
            )


def _is_pissa(network: PeftModel) -> bool:
    return str(_config(network).init_lora_weights).startswith("pissa")


def _pissa_layers(network: PeftModel) -> Iterator[tuple[str, LoraLinear]]:
    if _is_pissa(network):
        yield from ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLinear))


def _matrix(layer: LoraLinear, which: str) -> Tensor:
    matrices = layer.lora_A if which == "A" else layer.lora_B
    return matrices["default"].weight  # type: ignore[return-value]


@torch.no_grad()
def _load_pissa(layer: LoraLinear, state: dict[str, Tensor], name: str) -> None:
    """Split a saved difference into trained and initial matrices, and take the latter's part out of the base."""
    a, b = (f"{_PEFT_ROOT}{name}.lora_{which}.weight" for which in "AB")
    rank = layer.r["default"]
    trained_a, initial_a = state[a].split(rank)
    trained_b, initial_b = state[b].split(rank, 1)
    old_a, old_b = layer.get_buffer("initial_A"), layer.get_buffer("initial_B")
    weight = layer.get_base_layer().weight
    weight += layer.scaling["default"] * (old_b @ old_a + initial_b @ initial_a)  # the file holds -B₀
    old_a.copy_(initial_a)
    old_b.copy_(-initial_b)
    state[a], state[b] = trained_a.contiguous(), trained_b.contiguous()

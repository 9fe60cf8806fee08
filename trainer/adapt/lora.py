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
from trainer.spec.family import FamilySpec, matches
from trainer.spec.model import Lora
from trainer.weights import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_ROOT = "base_model.model."


def apply(network: nn.Module, method: Lora, family: FamilySpec, *, seed: int = 0) -> PeftModel:
    """Freeze ``network`` and put the adapter of ``method`` on it, in fp32, on the CPU.

    Until it is trained the adapter changes nothing (PiSSA: nothing but rounding). ``seed`` decides its random matrices,
    so that every rank has the same. ``method.train_also``'s modules are trained in full, without an adapter on what is
    inside them, and saved and loaded with the adapter. ``method.init`` is loaded.

    Raises:
        TrainingError: a target or a module is not in the network (those that are there are listed), a target is of a
            kind that cannot be adapted, nothing is left to adapt, or ``method.init`` is the adapter of another method
            or network.
    """
    targets = family.targets(method)
    also = [each.modules for each in method.train_also]
    _check_modules(network, also)
    _check_targets(network, targets, method)
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


def load_adapter(network: PeftModel, folder: Path, place: str | None = None) -> None:
    """Put the adapter in ``folder`` in the place of the network's own.

    Args:
        network: with its adapter.
        folder: with PEFT's two files.
        place: where they come from, for errors; by default ``folder``.

    Raises:
        TrainingError: it is of another kind or shape (rank, alpha, targets, network), or a file is missing.
    """
    place = place or str(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise TrainingError(f"the adapter in {place} has no {name}", "name a folder with PEFT's two files")
    if (kind := read_json(folder / CONFIG).get("peft_type")) != "LORA":
        raise TrainingError(f"the adapter in {place} is {kind}, not LORA", "name a LoRA adapter")
    found = LoraConfig.from_pretrained(str(folder))
    assert isinstance(found, LoraConfig)
    _check_same(found, _config_as_saved(network), place)
    state = load_file(folder / WEIGHTS)
    _check_tensors(state, adapter_state(network), place)
    for name, layer in _pissa_layers(network):
        _load_pissa(layer, state, name.removeprefix(_PEFT_ROOT))
    set_peft_model_state_dict(network, state)


def _check_targets(network: nn.Module, targets: tuple[str, ...], method: Lora) -> None:
    modules = dict(network.named_modules())
    found = {target: {name: one for name, one in modules.items() if matches(name, target)} for target in targets}
    for target, layers in found.items():
        other = [one for one in layers.values() if not isinstance(one, nn.Linear | nn.Embedding)]
        if other or not layers:
            linear = {name.rpartition(".")[2] for name, one in modules.items() if isinstance(one, nn.Linear)}
            raise TrainingError(
                f"method.targets: {target!r} is a {type(other[0]).__name__}, not a linear layer" if other
                else f"method.targets: the network has no linear layer named {target!r}",
                f"choose from {', '.join(sorted(linear - {*'0123456789'}))}, or longer endings of their full names",
            )  # fmt: skip
        if method.pissa and any(isinstance(one, nn.Embedding) for one in layers.values()):
            raise TrainingError(
                f"method.targets: {target!r} is an Embedding, and PEFT starts linear layers alone by PiSSA",
                "remove method.pissa or this target",
            )
    also = {each.modules for each in method.train_also}
    if all(name.partition(".")[0] in also for layers in found.values() for name in layers):
        raise TrainingError(
            "method.targets: all of them are in modules that method.train_also trains in full",
            "add another target, or use method full",
        )


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
        load_adapter(network, Path(folder), url)


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


def _check_same(found: LoraConfig, wanted: LoraConfig, place: str) -> None:
    for field in ("r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "alpha_pattern"):
        one, other = getattr(found, field), getattr(wanted, field)
        if field in ("target_modules", "modules_to_save"):
            one, other = sorted(one or []), sorted(other or [])
        if one != other:
            raise TrainingError(
                f"the adapter in {place} has {field} = {one}, the job's method asks for {other}",
                "set method to what the adapter was trained with, or name another adapter",
            )


def _check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: str) -> None:
    strange = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape},
    }
    told = [f"{what}: {min(names)} and {len(names) - 1} more" for what, names in strange.items() if names]
    if told:
        raise TrainingError(
            f"the adapter in {place} was trained on another network: {'; '.join(told)}",
            "name an adapter that was trained on this network",
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

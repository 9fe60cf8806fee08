"""What a family is without its network: prompts, safe and harmful targets, sizes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .model import BaseModelSpec, Lora

Modules = Mapping[str, tuple[tuple[int, int, int], ...]]
"""Name of a module that can be adapted → (inputs, outputs, how many) for each shape that has the name."""

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes of one parameter."""


@dataclass(frozen=True)
class Dims:
    """The size of a network; for two-stage networks, of the larger stage.

    Attributes:
        layers: how many.
        width: of the residual stream.
        ffn: hidden width of the feed-forward.
        heads: of the self-attention.
        vocabulary: codes in one codebook, 0 for latents.
        codebooks: of the codec, 0 for latents.
        parameters: in all.
        text_width: of the text encoder's output, 0 without one.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    vocabulary: int
    codebooks: int
    parameters: int
    text_width: int = 0


@dataclass(frozen=True)
class Preset:
    """A named set of LoRA settings."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    Attributes:
        name: as in ``model.family``.
        title: for people.
        options: what a job's ``model:`` may say.
        implementation: module and class that read weights, train and generate.
        licence_of_weights: of upstream's release.
        prompt_fields: fields of a validation prompt that count.
        text_fields: texts of a song that training uses.
        safe_targets: adapted by default.
        harmful_targets: module name → why adapting it, or what is inside it, does harm.
        presets: by their full name.
        train_also: modules that can be trained in full beside an adapter, and their parameters in the release.
        codecs: that it works with; the first is the release's.
        frame_rate: frames per second.
        dims: of the release.
        tiny: of ``random:tiny``.
        modules: what can be adapted, by the network's size; what lies in one of ``train_also`` begins with its name.
        sampling: the fields of ``validation.sampling`` that count, as upstream has them.
        other_sampling: those that differ in another release, where the job tells it.
        other_dims: the size of a network that is neither, where the job tells it.
    """

    name: str
    title: str
    options: type[BaseModelSpec]
    implementation: str
    licence_of_weights: str
    prompt_fields: tuple[str, ...]
    text_fields: tuple[str, ...]
    safe_targets: tuple[str, ...]
    codecs: tuple[str, ...]
    frame_rate: float
    dims: Dims
    tiny: Dims
    modules: Callable[[Dims], Modules]
    sampling: Mapping[str, float | str]
    other_dims: Callable[[Any], Dims | None] = lambda model: None
    other_sampling: Callable[[Any], Mapping[str, float | str]] = lambda model: {}
    harmful_targets: Mapping[str, str] = field(default_factory=dict[str, str])
    train_also: Mapping[str, int] = field(default_factory=dict[str, int])
    presets: Mapping[str, Preset] = field(default_factory=dict[str, Preset])

    @property
    def tokens_per_second(self) -> float:
        """Codes, or latent frames, in a second of audio."""
        return self.frame_rate * max(self.dims.codebooks, 1)

    def targets(self, method: Lora) -> tuple[str, ...]:
        """The module names that a LoRA run adapts."""
        return method.targets or self.safe_targets

    def harm(self, target: str) -> str | None:
        """Why adapting ``target`` does harm, if it does: it ends a harmful module's name, or contains it whole."""
        for name, reason in self.harmful_targets.items():
            if matches(name, target) or f".{name}." in f".{target}.":
                return reason
        return None


def matches(name: str, target: str) -> bool:
    """Whether ``target`` is ``name`` or an exact suffix of it, by whole components."""
    return f".{name}".endswith(f".{target}")


def adapted(family: FamilySpec, dims: Dims, targets: Collection[str], train_also: Collection[str] = ()) -> Modules:
    """The modules that ``targets`` name; PEFT leaves out what lies in a module that is trained in full anyway."""
    return {
        name: shapes
        for name, shapes in family.modules(dims).items()
        if any(matches(name, target) for target in targets) and name.partition(".")[0] not in train_also
    }


def lora_parameters(
    family: FamilySpec,
    dims: Dims,
    rank: int,
    targets: Collection[str],
    *,
    dora: bool = False,
    train_also: Collection[str] = (),
) -> int:
    """Trainable parameters of an adapter: rank · (inputs + outputs) for each adapted module; DoRA adds its outputs.

    Source: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2402.09353 (DoRA).
    """
    shapes = [shape for found in adapted(family, dims, targets, train_also).values() for shape in found]
    return sum(count * (rank * (inputs + outputs) + dora * outputs) for inputs, outputs, count in shapes)

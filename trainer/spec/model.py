"""``model:`` and ``method:``: which network is trained and how."""

from dataclasses import asdict
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from .base import Fraction, PositiveFloat, PositiveInt, Spec, StoreUrl, WeightsUrl


class Codec(Spec):
    """Audio ⇄ codes. Every weight comes from the user's own path.

    ``name`` defaults to the family's codec; ``weights`` maps a part of it (``vae``, ``muq``, ``vq``, …) to its URL.
    """

    name: Literal["pocket", "encodec", "songbloom", "firefly", "dcae", "heartcodec"] | None = None
    weights: dict[str, WeightsUrl] = Field(default_factory=dict)


class BaseModelSpec(Spec):
    """What every family has; those of its own are in ``spec.py`` of its room."""

    family: str
    pretrained: WeightsUrl
    """To start from: a directory of the official release, ``hf://org/repo``, ``random:tiny`` or ``builtin:pocket``."""
    codec: Codec = Codec()
    base_precision: Literal["auto", "int8"] = "auto"
    """``int8`` keeps the frozen base of a LoRA run in 8 bits (12–16 GB GPUs)."""
    segment_seconds: PositiveFloat = 30.0
    """Longer songs are cut into segments of at most this length."""

    def urls(self) -> dict[tuple[str, ...], str]:
        """Every place that weights, tokenizers and vocabularies come from, by its path in the job."""
        fields = type(self).model_fields
        names = ["pretrained", *(name for name, one in fields.items() if WeightsUrl in get_args(one.annotation))]
        named = {("model", name): url for name in names if (url := getattr(self, name))}
        return named | {("model", "codec", "weights", part): url for part, url in self.codec.weights.items()}


class Optimizer(Spec):
    """AdamW and its settings."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8


class Schedule(Spec):
    """Learning rate over the run: linear warm-up, then the shape named."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What the cosine ends at, as a share of the peak."""


class TrainAlso(Spec):
    """Modules trained in full beside the adapter, saved and restored with it."""

    modules: str
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None


class Lora(Spec):
    """Train a low-rank adapter; the base stays frozen."""

    type: Literal["lora"]
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Fraction = 0.0
    preset: str | None = None
    """A named set of rank, alpha, targets, rslora and dropout (``musicgen/attention``, ``fish-speech/r8a16``, …).

    What is given beside it wins; targets cannot be.
    """
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Module names to adapt, matched as exact suffixes; by default the family's safe set."""
    allow_harmful_targets: bool = False
    """Train targets that are known to do harm."""
    dora: bool = False
    """Learn direction and magnitude apart (https://arxiv.org/abs/2402.09353)."""
    rslora: bool = False
    """Scale by alpha ÷ √rank instead of alpha ÷ rank (https://arxiv.org/abs/2312.03732)."""
    pissa: bool = False
    """Start from the base's principal components (https://arxiv.org/abs/2404.02948)."""
    lora_plus: PositiveFloat | None = None
    """LoRA+: how many times faster the B matrices learn."""
    init: StoreUrl | None = None
    """Continue from this adapter (PEFT's file format)."""
    train_also: tuple[TrainAlso, ...] = ()

    @model_validator(mode="after")
    def _fill_from_preset(self) -> Self:
        from .families import PRESETS

        preset = PRESETS.get(self.preset or "")
        if preset:  # frozen protects a finished model; this one is being made
            for name in asdict(preset).keys() - self.model_fields_set:
                object.__setattr__(self, name, getattr(preset, name))
        return self


class Full(Spec):
    """Train every weight."""

    type: Literal["full"]


Method = Annotated[Lora | Full, Field(discriminator="type")]

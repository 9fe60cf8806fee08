"""The whole job file: ``Job``."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, model_validator

from .base import Name, PositiveFloat, PositiveInt, Secret, Spec, StoreUrl, no_password
from .cluster import Budget, Cluster, Local, Retrain
from .data import Data
from .families import FAMILIES, Model, sampling_of
from .model import Method, Optimizer, Schedule

RULES_LATER = {"rules": "later"}
"""Validation context: the caller looks for impossible combinations itself."""
OF_A_RUN = {"job": "of a run"}
"""Validation context: written by utaforge, maybe when every family had the same fields of ``Sampling``."""


class BatchSeconds(Spec):
    """One optimizer step takes this much audio, over all GPUs."""

    seconds: PositiveFloat
    micro_seconds: PositiveFloat | None = None
    """Audio in one forward pass on one GPU, padding included; by default what the plan says fits."""


class BatchSongs(Spec):
    """One optimizer step takes this many songs (or segments of songs), over all GPUs."""

    songs: PositiveInt
    micro_seconds: PositiveFloat | None = None


def _batch_kind(value: object) -> str:
    return "songs" if (isinstance(value, dict) and "songs" in value) or isinstance(value, BatchSongs) else "seconds"


Batch = Annotated[
    Annotated[BatchSeconds, Tag("seconds")] | Annotated[BatchSongs, Tag("songs")], Discriminator(_batch_kind)
]


class Train(Spec):
    """The optimisation itself."""

    steps: PositiveInt
    batch: Batch
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    strategy: Literal["auto", "ddp", "zero2", "zero3"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: PositiveInt = 1
    plateau_watch: bool = True
    """Stop, with the likely cause, when the loss is still at ln(vocabulary) well after the warm-up."""


class Keep(Spec):
    """Which checkpoints stay: the newest and those with the lowest validation loss."""

    last: PositiveInt = 2
    best: Annotated[int, Field(ge=0)] = 1


class Checkpoint(Spec):
    """How often the state is committed to the store; the end of a run always is."""

    every: PositiveInt = 500
    keep: Keep = Keep()


class Prompt(Spec):
    """What validation audio is generated from; which fields count depends on the family."""

    tags: str = ""
    lyrics: str = ""
    style: StoreUrl | None = None
    """A recording of what it should sound like; for fish-speech, of the voice."""
    style_text: str | None = None
    """What is said in ``style``, where the family has to know."""
    speaker: str | None = None
    seconds: PositiveFloat = 10.0
    seed: Annotated[int, Field(ge=0)] = 0


class Sampling(Spec):
    """How tokens or noise become a song; each family listens to some fields, and to no other.

    What is not given is as upstream has it (``FamilySpec.sampling``); a resolved job has it written out.
    """

    guidance: Annotated[float, Field(ge=1)] | None = None
    """How closely the prompt is followed; 1: no guidance."""
    temperature: PositiveFloat | None = None
    """Of the tokens; below 1 the likely ones become likelier."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """So many of the likeliest tokens are chosen from; 0: no limit."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """The likeliest tokens that together have this probability are chosen from; 0: the likeliest alone."""
    repetition_penalty: Annotated[float, Field(ge=1)] | None = None
    """Makes tokens that were just there less likely; 1: no penalty."""
    sampler: Literal["euler", "heun", "pingpong"] | None = None
    """How noise becomes latents: ``heun`` calls the network twice a step; ``pingpong`` adds fresh noise each step."""
    steps: PositiveInt | None = None
    """From noise to latents; ACE-Step's of a whole song (27 are upstream's fast setting), SongBloom's of each block."""
    flow_temperature: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where SongBloom's flow, until then without noise, is given noise; 1: it starts from noise."""

    @property
    def given(self) -> dict[str, Any]:
        """The fields that have a value."""
        return self.model_dump(exclude_none=True)


class ValidationSpec(Spec):
    """Listening while training: held-out loss, and songs rendered with the current weights."""

    every: PositiveInt = 500
    prompts: tuple[Prompt, ...] = ()
    sampling: Sampling = Sampling()
    format: Literal["wav", "flac", "mp3"] = "flac"
    stop_if: tuple[Literal["vocals_lost", "silent", "looping"], ...] = ()


def _tracking_uri(value: str) -> str:
    if not re.match(r"(https?|sqlite|postgresql)(\+\w+)?://.", value):
        raise ValueError(
            f"{value!r} is not an address of MLflow; write http://HOST:5000 or sqlite:///path/to/mlflow.db"
        )
    return no_password(value)


class Tracking(Spec):
    """Where metrics go."""

    mlflow: Annotated[str, AfterValidator(_tracking_uri)] | None = None
    """Tracking URI; by default an SQLite file under ``.utaforge/``."""
    username: str | None = None
    password: Secret | None = None
    experiment: str | None = None
    """By default the job's name."""


class Job(Spec):
    """A job file: what to train, on what data, on which cluster, how it is judged."""

    kind: Literal["train", "train-vq"] = "train"
    name: Name
    store: StoreUrl
    model: Model
    method: Method
    data: Data
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    validation: ValidationSpec = ValidationSpec()
    tracking: Tracking = Tracking()
    cluster: Cluster = Local()
    budget: Budget = Budget()
    retrain: Retrain | None = None

    @model_validator(mode="after")
    def _fill_sampling(self, info: ValidationInfo) -> Self:
        given = self.validation.sampling.given
        if info.context == OF_A_RUN:
            given = {name: value for name, value in given.items() if name in FAMILIES[self.model.family].sampling}
        sampling = Sampling.model_validate(sampling_of(self.model) | given)
        # frozen protects a finished model; this one is being made
        object.__setattr__(self, "validation", self.validation.model_copy(update={"sampling": sampling}))
        return self

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> Self:
        from .rules import impossible_combinations

        if info.context != RULES_LATER and (faults := impossible_combinations(self)):
            raise ValueError("\n".join(faults))
        return self

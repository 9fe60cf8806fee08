"""What a job may say of ACE-Step, and what it takes; numbers are from upstream's published configurations."""

from itertools import product
from typing import Annotated, Literal

from pydantic import Field

from trainer.spec.base import PositiveFloat, PositiveInt, Spec, WeightsUrl
from trainer.spec.family import Dims, FamilySpec, Modules, Preset
from trainer.spec.model import BaseModelSpec


class ScheduledSampling(Spec):
    """Roll the model's own prediction into its input while training (diffusion families)."""

    max_offset: PositiveInt = 1
    probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    ramp_steps: Annotated[int, Field(ge=0)] = 0
    sampler: Literal["euler", "heun"] = "euler"


class AceStep(BaseModelSpec):
    """ACE-Step: tags and lyrics → DCAE latents, by flow matching."""

    family: Literal["ace_step"]
    text_encoder: WeightsUrl | None = None
    """UMT5's directory; by default ``umt5-base`` inside ``pretrained``."""
    lyric_vocabulary: WeightsUrl | None = None
    """``vocab.json`` of upstream's code (``models/lyrics_utils``); the release of the weights has none."""
    shift: PositiveFloat = 3.0
    """How far timesteps are shifted towards noise, in training and sampling alike."""
    ssl_features: bool = False
    """Also learn to guess MERT's and mHuBERT's features, which hold the lyrics; songs bring them as
    ``SONG.mert.npy`` and ``SONG.mhubert.npy``."""
    segment_seconds: PositiveFloat = 240.0
    """Longer songs are cut into segments of at most this length (upstream trains on whole songs up to it)."""
    scheduled_sampling: ScheduledSampling | None = None


def _modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    lyrics = ((1024, 1024, 6),)
    attentions = product(("attn", "cross_attn"), ("to_q", "to_k", "to_v", "to_out.0"))
    return {
        **{f"{block}.{name}": square for block, name in attentions},
        **{f"lyric_encoder.self_attn.linear_{name}": lyrics for name in "qkv"},
        "speaker_embedder": ((512, dims.width, 1),),
    }


_IDLE = "the network never uses it, so it would never learn"
_SSL = "it serves the SSL terms of the loss alone, and no song is made with it"
_PROJECTORS = tuple(f"projectors.{encoder}.{layer}" for encoder in (0, 1) for layer in (0, 2, 4))

SPEC = FamilySpec(
    name="ace_step",
    title="ACE-Step v1 3.5B",
    options=AceStep,
    implementation="trainer.families.ace_step.family:AceStepFamily",
    licence_of_weights="Apache-2.0",
    prompt_fields=("tags", "lyrics"),
    text_fields=("tags", "lyrics"),
    safe_targets=("to_q", "to_k", "to_v", "to_out.0", "linear_q", "linear_k", "linear_v"),
    codecs=("dcae",),
    frame_rate=44_100 / 512 / 8,
    dims=Dims(24, 2560, 6400, 20, 0, 0, 3_305_659_264, 768),
    tiny=Dims(2, 32, 80, 2, 0, 0, 441_328, 32),
    modules=_modules,
    sampling={"guidance": 15.0, "sampler": "euler", "steps": 60},
    harmful_targets={
        **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), _IDLE),
        **dict.fromkeys(("projectors", *_PROJECTORS), _SSL),
    },
    train_also={"lyric_embs": 6_853_632, "lyric_encoder": 82_934_784, "lyric_proj": 2_624_000},
    presets={
        "ace-step/upstream": Preset(
            256,
            32,
            ("speaker_embedder", "linear_q", "linear_k", "linear_v", "to_q", "to_k", "to_v", "to_out.0"),
            rslora=True,
        ),
    },
)

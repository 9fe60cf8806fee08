"""What a job may say of HeartMuLa, and what it takes; numbers are from upstream's published configurations."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.spec.base import Fraction, PositiveFloat, WeightsUrl
from trainer.spec.family import Dims, FamilySpec, Modules, Preset
from trainer.spec.model import BaseModelSpec


class HeartMuLa(BaseModelSpec):
    """HeartMuLa: tags and lyrics → HeartCodec tokens."""

    family: Literal["heartmula"]
    tokenizer: WeightsUrl | None = None
    """Llama 3's ``tokenizer.json``; by default the one beside the weights or in the folder above them."""
    cfg_dropout: Fraction = 0.1
    """How often tags and lyrics are dropped in training, so that guidance works."""
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the frames on which the depth decoder is trained."""
    segment_seconds: PositiveFloat = 240.0
    """Longer songs are cut into segments of at most this length, each with the lyrics of the whole song."""


def _modules(dims: Dims) -> Modules:
    depth = 3
    square = ((dims.width, dims.width, dims.layers + depth),)
    grouped = ((dims.width, 1024, dims.layers), (dims.width, 1536, depth))
    up, down = ((dims.width, dims.ffn, dims.layers + depth),), ((dims.ffn, dims.width, dims.layers + depth),)
    attention = {"q_proj": square, "k_proj": grouped, "v_proj": grouped, "output_proj": square}
    return {**{f"attn.{name}": shape for name, shape in attention.items()}, "mlp.w1": up, "mlp.w3": up, "mlp.w2": down}


SPEC = FamilySpec(
    name="heartmula",
    title="HeartMuLa oss-3B",
    options=HeartMuLa,
    implementation="trainer.families.heartmula.family:HeartMuLaFamily",
    licence_of_weights="Apache-2.0",
    prompt_fields=("tags", "lyrics"),
    text_fields=("tags", "lyrics"),
    safe_targets=("q_proj", "k_proj", "v_proj", "output_proj"),
    codecs=("heartcodec",),
    frame_rate=12.5,
    dims=Dims(28, 3072, 8192, 24, 8197, 8, 3_938_113_536),
    tiny=Dims(2, 64, 128, 4, 1029, 8, 1_223_552),
    modules=_modules,
    sampling={"guidance": 1.5, "temperature": 1.0, "top_k": 50},
    harmful_targets={
        "muq_linear": "it only ever sees zeros, as no reference audio is supported, so its adapter would never learn"
    },
    presets={
        "heartmula/attention": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "output_proj")),
        "heartmula/all-linear": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")),
    },
)

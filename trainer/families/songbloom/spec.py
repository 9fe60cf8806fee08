"""What a job may say of SongBloom, and what it takes; numbers are from upstream's published configurations."""

from typing import Literal

from trainer.spec.base import Fraction, PositiveFloat
from trainer.spec.family import Dims, FamilySpec, Modules, Preset
from trainer.spec.model import BaseModelSpec


class SongBloom(BaseModelSpec):
    """SongBloom: lyrics and a style prompt → sketch tokens and VAE latents."""

    family: Literal["songbloom"]
    cfg_dropout: Fraction = 0.1
    style_seconds: PositiveFloat = 10.0
    segment_seconds: PositiveFloat = 150.0
    """Longer songs are cut into segments of at most this length; 240 for the release of that name."""


def _sampling_of_240s(model: SongBloom) -> dict[str, float]:
    """As a third party publishes the configuration of that release."""
    return {"flow_temperature": 0.9} if model.segment_seconds > 150 or "240s" in model.pretrained else {}


def _modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    up, down = ((dims.width, dims.ffn, dims.layers),), ((dims.ffn, dims.width, dims.layers),)
    return {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        **{"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down},
        "self_attn.to_qkv": ((dims.width, 3 * dims.width, 12),),
        "self_attn.to_out": ((dims.width, dims.width, 12),),
    }


_VOCALS = "adapting the DiT that renders the sound destroyed the vocals from the first epochs"
_NOT_THERE = f"SongBloom has to_qkv alone, and {_VOCALS}"
_BOTH_STAGES = "the name is also in the DiT that renders the sound; write mlp.{} for the planning network alone"

SPEC = FamilySpec(
    name="songbloom",
    title="SongBloom",
    options=SongBloom,
    implementation="trainer.families.songbloom.family:SongBloomFamily",
    licence_of_weights="academic use only",
    prompt_fields=("lyrics", "style"),
    text_fields=("lyrics",),
    safe_targets=("q_proj", "v_proj"),
    codecs=("songbloom",),
    frame_rate=25.0,
    dims=Dims(36, 1536, 6144, 24, 16_384, 1, 1_872_260_801),
    tiny=Dims(2, 64, 128, 2, 256, 1, 251_333),
    modules=_modules,
    sampling={
        "guidance": 1.5,
        "temperature": 0.9,
        "top_k": 100,
        "repetition_penalty": 1.1,
        "steps": 36,
        "flow_temperature": 0.95,
    },
    other_sampling=_sampling_of_240s,
    harmful_targets={
        **dict.fromkeys(("nar_dit", "to_qkv", "to_out", "ff.ff.2", "project_in", "project_out"), _VOCALS),
        **dict.fromkeys(("block_conv", "block_conv.1", "block_conv.3"), _VOCALS),
        **dict.fromkeys(("to_timestep_embed", "to_timestep_embed.0", "to_timestep_embed.2"), _VOCALS),
        **{f"ff.ff.0.{name}": _BOTH_STAGES.format(name) for name in ("up_proj", "gate_proj")},
        **dict.fromkeys(("to_q", "to_kv"), _NOT_THERE),
    },
    train_also={"skeleton_emb": 25_168_896, "skeleton_classifier": 27_543_041},
    presets={"songbloom/ar": Preset(16, 32, ("q_proj", "v_proj"))},
)

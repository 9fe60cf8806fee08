"""What a job may say of MusicGen, and what it takes; numbers are from upstream's published configurations."""

import json
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

from trainer.spec.base import Fraction, PositiveFloat, WeightsUrl
from trainer.spec.errors import JobError
from trainer.spec.family import Dims, FamilySpec, Modules, Preset
from trainer.spec.model import BaseModelSpec


class MusicGen(BaseModelSpec):
    """MusicGen: description → EnCodec tokens."""

    family: Literal["musicgen"]
    text_encoder: WeightsUrl | None = None
    """T5 encoder's directory; by default the text encoder inside ``pretrained``."""
    cfg_dropout: Fraction = 0.3
    """How often the description is dropped in training, so that guidance works (audiocraft: 0.3)."""
    dropout: Fraction = 0.0
    """Dropout inside the network; audiocraft trains with 0, whatever the released config says."""
    segment_seconds: PositiveFloat = 30.0
    """Longer songs are cut into segments of at most this length (the network has 2,048 positions)."""


def _told_dims(model: MusicGen) -> Dims | None:
    if model.pretrained == "builtin:pocket":
        return _read_dims(Path(__file__).parents[2] / "builtin" / "pocket" / "config.json")
    path = Path(model.pretrained.removeprefix("file://"))
    config = (path.parent if path.is_file() else path) / "config.json"
    return _read_dims(config) if model.pretrained.startswith("file://") and config.is_file() else None


def _read_dims(path: Path) -> Dims:
    """Keys that a configuration leaves out have transformers' defaults (``MusicgenDecoderConfig``)."""
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        decoder = config["decoder"]
        return _dims(
            layers=decoder.get("num_hidden_layers", 24),
            width=decoder.get("hidden_size", 1024),
            ffn=decoder.get("ffn_dim", 4096),
            heads=decoder.get("num_attention_heads", 16),
            vocabulary=decoder.get("vocab_size", 2048),
            codebooks=decoder.get("num_codebooks", 4),
            text_width=config["text_encoder"]["d_model"],
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise JobError(
            f"model.pretrained: {path} is not the configuration of a MusicGen ({type(error).__name__}: {error})",
            "point model.pretrained at a directory of the official release",
        ) from None


def _dims(layers: int, width: int, ffn: int, heads: int, vocabulary: int, codebooks: int, text_width: int) -> Dims:
    """Counted as ``MusicgenForCausalLM`` plus ``enc_to_dec_proj``; no linear has a bias but the latter."""
    layer = 8 * width**2 + 2 * width * ffn + 6 * width
    books = codebooks * (2 * vocabulary + 1) * width
    parameters = layers * layer + books + 2 * width + (text_width + 1) * width
    return Dims(layers, width, ffn, heads, vocabulary, codebooks, parameters, text_width)


def _modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    attentions = product(("self_attn", "encoder_attn"), ("q", "k", "v", "out"))
    return {
        **{f"{block}.{name}_proj": square for block, name in attentions},
        "fc1": ((dims.width, dims.ffn, dims.layers),),
        "fc2": ((dims.ffn, dims.width, dims.layers),),
        "enc_to_dec_proj": ((dims.text_width, dims.width, 1),),
        **{f"lm_heads.{book}": ((dims.width, dims.vocabulary, 1),) for book in range(dims.codebooks)},
    }


SPEC = FamilySpec(
    name="musicgen",
    title="MusicGen",
    options=MusicGen,
    implementation="trainer.families.musicgen.family:MusicGenFamily",
    licence_of_weights="CC-BY-NC-4.0",
    prompt_fields=("tags",),
    text_fields=("tags",),
    safe_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    codecs=("encodec", "pocket"),
    frame_rate=50.0,
    dims=_dims(layers=48, width=2048, ffn=8192, heads=32, vocabulary=2048, codebooks=4, text_width=768),
    tiny=_dims(layers=2, width=64, ffn=128, heads=4, vocabulary=256, codebooks=4, text_width=64),
    modules=_modules,
    sampling={"guidance": 3.0, "temperature": 1.0, "top_k": 250},
    other_dims=_told_dims,
    train_also={"enc_to_dec_proj": 1_574_912},
    presets={
        "musicgen/attention": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "out_proj")),
        "musicgen/all": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    },
)

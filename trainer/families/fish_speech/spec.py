"""What a job may say of fish-speech, and what it takes; numbers are from upstream's published configurations."""

from dataclasses import replace
from typing import Literal

from trainer.spec.base import PositiveFloat
from trainer.spec.family import Dims, FamilySpec, Modules, Preset
from trainer.spec.model import BaseModelSpec


class FishSpeech(BaseModelSpec):
    """fish-speech text2semantic: text → FireflyGAN codes."""

    family: Literal["fish_speech"]
    version: Literal["1.4", "1.5"] = "1.5"
    """They differ in tokenizer, prompt and what is learned; the weights of one are of no use as the other."""
    segment_seconds: PositiveFloat = 120.0
    """Longer songs are cut into segments of at most this length, each with the text of the whole song."""


def _dims_of_1_4(model: FishSpeech) -> Dims | None:
    if model.version == "1.5":
        return None
    if model.pretrained == "random:tiny":
        return replace(SPEC.tiny, parameters=801_280)
    return replace(SPEC.dims, parameters=494_462_976)


def _modules(dims: Dims) -> Modules:
    layers, text = dims.layers + 4, 102_048 if dims.parameters > 6e8 else 32_000
    up, down = ((dims.width, dims.ffn, layers),), ((dims.ffn, dims.width, layers),)
    return {
        "wqkv": ((dims.width, dims.width + 256, layers),),
        "wo": ((dims.width, dims.width, layers),),
        **{"w1": up, "w3": up, "w2": down},
        "embeddings": ((text, dims.width, 1),),
        "codebook_embeddings": ((8192, dims.width, 1),),
        "fast_embeddings": ((1024, dims.width, 1),),
        "output": ((dims.width, text, 1),),
        "fast_output": ((dims.width, 1024, 1),),
    }


_LAYERS = ("wqkv", "wo", "w1", "w2", "w3")

SPEC = FamilySpec(
    name="fish_speech",
    title="fish-speech 1.4 / 1.5",
    options=FishSpeech,
    implementation="trainer.families.fish_speech.family:FishSpeechFamily",
    licence_of_weights="CC-BY-NC-SA-4.0",
    prompt_fields=("lyrics", "speaker", "style", "style_text"),
    text_fields=("lyrics", "tags"),
    safe_targets=_LAYERS,
    codecs=("firefly",),
    frame_rate=44_100 / 2048,
    dims=Dims(24, 1024, 4096, 16, 1024, 8, 637_921_280),
    tiny=Dims(2, 64, 128, 4, 1024, 8, 932_352),
    modules=_modules,
    sampling={"temperature": 0.7, "top_p": 0.7, "top_k": 0, "repetition_penalty": 1.2},
    other_dims=_dims_of_1_4,
    presets={
        "fish-speech/r8a16": Preset(
            8,
            16,
            (*_LAYERS, "embeddings", "codebook_embeddings", "fast_embeddings", "output", "fast_output"),
            dropout=0.01,
        ),
    },
)

"""What a family is without its network: prompts, safe and harmful targets, sizes.

Numbers come from upstream's published configurations.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from .errors import JobError
from .model import FishSpeech, Lora, Model, MusicGen

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


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    Attributes:
        name: as in ``model.family``.
        title: for people.
        licence_of_weights: of upstream's release.
        prompt_fields: fields of a validation prompt that count.
        text_fields: texts of a song that training uses.
        safe_targets: adapted by default.
        harmful_targets: module name → why adapting it does harm.
        presets: by their full name.
        train_also: modules that can be trained in full beside an adapter, and their parameters in the release.
        codecs: that it works with; the first is the release's.
        frame_rate: frames per second.
        dims: of the release.
        modules: what can be adapted, by the network's size.
    """

    name: str
    title: str
    licence_of_weights: str
    prompt_fields: tuple[str, ...]
    text_fields: tuple[str, ...]
    safe_targets: tuple[str, ...]
    codecs: tuple[str, ...]
    frame_rate: float
    dims: Dims
    modules: Callable[[Dims], Modules]
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
        """Why adapting ``target`` does harm, if it does."""
        for name, reason in self.harmful_targets.items():
            if matches(name, target) or matches(target, name):
                return reason
        return None


def matches(name: str, target: str) -> bool:
    """Whether ``target`` is ``name`` or an exact suffix of it, by whole components."""
    return f".{name}".endswith(f".{target}")


def codec_of(model: Model) -> str:
    """The codec's name: as given, else what the weights were made with."""
    if model.codec.name:
        return model.codec.name
    small = model.family == "musicgen" and model.pretrained in ("builtin:pocket", "random:tiny")
    return "pocket" if small else FAMILIES[model.family].codecs[0]


def dims_of(model: Model) -> Dims:
    """The network's size: from its configuration where this machine can read it, else the release's.

    Raises:
        JobError: if there is a ``config.json`` that cannot be understood.
    """
    older = isinstance(model, FishSpeech) and model.version == "1.4"
    if model.pretrained == "random:tiny":
        return _tiny()["fish_speech 1.4" if older else model.family]
    published = FAMILIES[model.family].dims
    if isinstance(model, MusicGen):
        config = _config_path(model.pretrained)
        return _read_dims(config) if config and config.is_file() else published
    return replace(published, parameters=494_462_976) if older else published


def _tiny() -> Mapping[str, Dims]:
    return {
        "musicgen": _musicgen(layers=2, width=64, ffn=128, heads=4, vocabulary=256, codebooks=4, text_width=64),
        "songbloom": Dims(2, 64, 128, 2, 256, 1, 251_333),
        "heartmula": Dims(2, 64, 128, 4, 1029, 8, 1_223_552),
        "ace_step": Dims(2, 32, 80, 2, 0, 0, 441_328, 32),
        "fish_speech": Dims(2, 64, 128, 4, 1024, 8, 932_352),
        "fish_speech 1.4": Dims(2, 64, 128, 4, 1024, 8, 801_280),
    }


def lora_parameters(family: FamilySpec, dims: Dims, rank: int, targets: tuple[str, ...], *, dora: bool = False) -> int:
    """Trainable parameters of an adapter: rank · (inputs + outputs) for each adapted module; DoRA adds its outputs.

    Source: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2402.09353 (DoRA).
    """
    shapes = [
        shape
        for name, found in family.modules(dims).items()
        if any(matches(name, target) for target in targets)
        for shape in found
    ]
    return sum(count * (rank * (inputs + outputs) + dora * outputs) for inputs, outputs, count in shapes)


def _config_path(pretrained: str) -> Path | None:
    if pretrained == "builtin:pocket":
        return Path(__file__).parents[1] / "builtin" / "pocket" / "config.json"
    return Path(pretrained.removeprefix("file://")) / "config.json" if pretrained.startswith("file://") else None


def _read_dims(path: Path) -> Dims:
    """Keys that a configuration leaves out have transformers' defaults (``MusicgenDecoderConfig``)."""
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        decoder = config["decoder"]
        return _musicgen(
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


def _musicgen(layers: int, width: int, ffn: int, heads: int, vocabulary: int, codebooks: int, text_width: int) -> Dims:
    """Counted as ``MusicgenForCausalLM`` plus ``enc_to_dec_proj``; no linear has a bias but the latter."""
    layer = 8 * width**2 + 2 * width * ffn + 6 * width
    books = codebooks * (2 * vocabulary + 1) * width
    parameters = layers * layer + books + 2 * width + (text_width + 1) * width
    return Dims(layers, width, ffn, heads, vocabulary, codebooks, parameters, text_width)


def _musicgen_modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    attentions = product(("self_attn", "encoder_attn"), ("q", "k", "v", "out"))
    return {
        **{f"{block}.{name}_proj": square for block, name in attentions},
        "fc1": ((dims.width, dims.ffn, dims.layers),),
        "fc2": ((dims.ffn, dims.width, dims.layers),),
        "enc_to_dec_proj": ((dims.text_width, dims.width, 1),),
        **{f"lm_heads.{book}": ((dims.width, dims.vocabulary, 1),) for book in range(dims.codebooks)},
    }


def _songbloom_modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    up, down = ((dims.width, dims.ffn, dims.layers),), ((dims.ffn, dims.width, dims.layers),)
    return {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        **{"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down},
        "self_attn.to_qkv": ((dims.width, 3 * dims.width, 12),),
        "self_attn.to_out": ((dims.width, dims.width, 12),),
    }


def _heartmula_modules(dims: Dims) -> Modules:
    depth = 3
    square = ((dims.width, dims.width, dims.layers + depth),)
    grouped = ((dims.width, 1024, dims.layers), (dims.width, 1536, depth))
    up, down = ((dims.width, dims.ffn, dims.layers + depth),), ((dims.ffn, dims.width, dims.layers + depth),)
    attention = {"q_proj": square, "k_proj": grouped, "v_proj": grouped, "output_proj": square}
    return {**{f"attn.{name}": shape for name, shape in attention.items()}, "mlp.w1": up, "mlp.w3": up, "mlp.w2": down}


def _ace_step_modules(dims: Dims) -> Modules:
    square = ((dims.width, dims.width, dims.layers),)
    lyrics = ((1024, 1024, 6),)
    attentions = product(("attn", "cross_attn"), ("to_q", "to_k", "to_v", "to_out.0"))
    return {
        **{f"{block}.{name}": square for block, name in attentions},
        **{f"self_attn.linear_{name}": lyrics for name in "qkv"},
        "speaker_embedder": ((512, dims.width, 1),),
    }


def _fish_speech_modules(dims: Dims) -> Modules:
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


_VOCALS = "adapting the DiT that renders the sound destroyed the vocals from the first epochs"
_BOTH_STAGES = "the name is also in the DiT that renders the sound; write mlp.{} for the planning network alone"
_IDLE = "the network never uses it, so it would never learn"
_FISH_LAYERS = ("wqkv", "wo", "w1", "w2", "w3")

MUSICGEN = FamilySpec(
    name="musicgen",
    title="MusicGen",
    licence_of_weights="CC-BY-NC-4.0",
    prompt_fields=("tags",),
    text_fields=("tags",),
    safe_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    codecs=("encodec", "pocket"),
    frame_rate=50.0,
    dims=_musicgen(layers=48, width=2048, ffn=8192, heads=32, vocabulary=2048, codebooks=4, text_width=768),
    modules=_musicgen_modules,
    train_also={"enc_to_dec_proj": 1_574_912},
    presets={
        "musicgen/attention": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "out_proj")),
        "musicgen/all": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    },
)
SONGBLOOM = FamilySpec(
    name="songbloom",
    title="SongBloom",
    licence_of_weights="academic use only",
    prompt_fields=("lyrics", "style"),
    text_fields=("lyrics",),
    safe_targets=("q_proj", "v_proj"),
    codecs=("songbloom",),
    frame_rate=25.0,
    dims=Dims(36, 1536, 6144, 24, 16_384, 1, 1_872_260_801),
    modules=_songbloom_modules,
    harmful_targets={
        **dict.fromkeys(("to_qkv", "to_out", "project_in", "project_out", "to_timestep_embed", "block_conv"), _VOCALS),
        **{f"ff.ff.0.{name}": _BOTH_STAGES.format(name) for name in ("up_proj", "gate_proj")},
        "ff.ff.2": _VOCALS,
    },
    train_also={"skeleton_emb": 25_168_896, "skeleton_classifier": 27_543_041},
    presets={"songbloom/ar": Preset(16, 32, ("q_proj", "v_proj"))},
)
HEARTMULA = FamilySpec(
    name="heartmula",
    title="HeartMuLa oss-3B",
    licence_of_weights="Apache-2.0",
    prompt_fields=("tags", "lyrics"),
    text_fields=("tags", "lyrics"),
    safe_targets=("q_proj", "k_proj", "v_proj", "output_proj"),
    codecs=("heartcodec",),
    frame_rate=12.5,
    dims=Dims(28, 3072, 8192, 24, 8197, 8, 3_938_113_536),
    modules=_heartmula_modules,
    presets={
        "heartmula/attention": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "output_proj")),
        "heartmula/all-linear": Preset(16, 32, ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")),
    },
)
ACE_STEP = FamilySpec(
    name="ace_step",
    title="ACE-Step v1 3.5B",
    licence_of_weights="Apache-2.0",
    prompt_fields=("tags", "lyrics"),
    text_fields=("tags", "lyrics"),
    safe_targets=("to_q", "to_k", "to_v", "to_out.0", "linear_q", "linear_k", "linear_v"),
    codecs=("dcae",),
    frame_rate=44_100 / 512 / 8,
    dims=Dims(24, 2560, 6400, 20, 0, 0, 3_305_659_264, 768),
    modules=_ace_step_modules,
    harmful_targets=dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), _IDLE),
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
FISH_SPEECH = FamilySpec(
    name="fish_speech",
    title="fish-speech 1.4 / 1.5",
    licence_of_weights="CC-BY-NC-SA-4.0",
    prompt_fields=("lyrics", "speaker"),
    text_fields=("lyrics", "tags"),
    safe_targets=_FISH_LAYERS,
    codecs=("firefly",),
    frame_rate=44_100 / 2048,
    dims=Dims(24, 1024, 4096, 16, 1024, 8, 637_921_280),
    modules=_fish_speech_modules,
    presets={
        "fish-speech/r8a16": Preset(
            8,
            16,
            (*_FISH_LAYERS, "embeddings", "codebook_embeddings", "fast_embeddings", "output", "fast_output"),
        ),
    },
)
FAMILIES: Mapping[str, FamilySpec] = {
    family.name: family for family in (MUSICGEN, SONGBLOOM, HEARTMULA, ACE_STEP, FISH_SPEECH)
}
"""All families, by name."""
PRESETS: Mapping[str, Preset] = {
    name: preset for family in FAMILIES.values() for name, preset in family.presets.items()
}
"""All presets, by full name."""

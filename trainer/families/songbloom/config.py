"""The shape of a SongBloom, under names of ours, from a release's own configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trainer.spec.errors import UtaforgeError


@dataclass(frozen=True)
class SongBloomConfig:
    """Sizes and settings that the network follows.

    Attributes:
        dim: width of both transformers.
        heads: of both.
        ffn: hidden width of both feed-forwards.
        plan_layers: layers of the autoregressive transformer.
        flow_layers: layers of the DiT.
        block: frames of a block.
        latent_dim: channels of the VAE's latents.
        pitches: entries of the sketch codebook.
        rotary_base: of the autoregressive transformer.
        time_features: Fourier features of the flow time.
        init_std: of fresh weights.
        h_dropout: how often a block's DiT goes without the plan's output, and how often without the sketch.
        prompt_dropout: how often the style is dropped alone.
        tokens: the vocabulary of lyrics.
        lyric_length: positions for lyrics.
        sentences: rows of the table of sentence numbers.
        prompt_length: positions for the style, in frames.
        max_seconds: the longest song it was trained on.
    """

    dim: int
    heads: int
    ffn: int
    plan_layers: int
    flow_layers: int
    block: int
    latent_dim: int
    pitches: int
    rotary_base: float
    time_features: int
    init_std: float
    h_dropout: float
    prompt_dropout: float
    tokens: tuple[str, ...]
    lyric_length: int
    sentences: int
    prompt_length: int
    max_seconds: float

    @property
    def eos(self) -> int:
        """The sketch id after the last frame."""
        return self.pitches


ONLY = {
    "time_cond_type": "prepend",
    "diffusion_objective": "rectified_flow",
    "timestep_sampler": "logit_normal",
    "backend": "llama",
}
"""Settings that every release has; other ones are not written here."""


def from_upstream(model: Mapping[str, Any], max_seconds: float) -> SongBloomConfig:
    """The configuration in a release's ``model:`` section, references resolved.

    Raises:
        UtaforgeError: it asks for something that no release has, or lacks something.
    """
    try:
        for name, value in ONLY.items():
            if model.get(name, value) != value:
                raise UtaforgeError(f"{name}: {model[name]} is not known here", f"use a release with {name}: {value}")
        conditions = model["condition_provider_cfg"]
        lyrics, prompt = conditions["lyrics"], conditions["prompt_wav"]
        prepended = model["fuser_cfg"]["prepend"]
        if prepended != ["lyrics", "prompt_wav"] or lyrics["mode"] != "sum":
            raise UtaforgeError(
                f"conditions {prepended} with lyrics of mode {lyrics['mode']} are not known here",
                "use an official release: lyrics (sum) and prompt_wav are put before the song",
            )
        config = SongBloomConfig(
            dim=model["dim"],
            heads=model["num_heads"],
            ffn=model["dim"] * model["hidden_scale"],
            plan_layers=model["lm_layers"],
            flow_layers=model["diff_layers"],
            block=model["block_size"],
            latent_dim=model["latent_dim"],
            pitches=model["num_pitch"],
            rotary_base=model["rotary_base_val"],
            time_features=model["timestep_features_dim"],
            init_std=model["init_std"],
            h_dropout=model["h_dropout"],
            prompt_dropout=model["attribute_dropout"]["wav"]["prompt_wav"],
            tokens=tuple(lyrics["vocab_list"]),
            lyric_length=lyrics["max_len"],
            sentences=lyrics["max_sentence_per_structure"],
            prompt_length=prompt["max_len"],
            max_seconds=max_seconds,
        )
        if vague := [field.name for field in fields(config) if isinstance(getattr(config, field.name), str)]:
            raise TypeError(f"{', '.join(vague)} should be numbers")
        return config
    except (KeyError, TypeError) as error:
        raise UtaforgeError(
            f"the configuration is not a SongBloom's ({type(error).__name__}: {error})", "copy the release's own yaml"
        ) from error


def to_upstream(config: SongBloomConfig) -> dict[str, Any]:
    """``config`` as a release's ``model:`` section."""
    return {
        **ONLY,
        "dim": config.dim,
        "num_heads": config.heads,
        "hidden_scale": config.ffn // config.dim,
        "lm_layers": config.plan_layers,
        "diff_layers": config.flow_layers,
        "block_size": config.block,
        "latent_dim": config.latent_dim,
        "num_pitch": config.pitches,
        "rotary_base_val": config.rotary_base,
        "timestep_features_dim": config.time_features,
        "init_std": config.init_std,
        "h_dropout": config.h_dropout,
        "attribute_dropout": {"text": {"lyrics": 0.0}, "wav": {"prompt_wav": config.prompt_dropout}},
        "fuser_cfg": {"prepend": ["lyrics", "prompt_wav"]},
        "condition_provider_cfg": {
            "lyrics": {
                "type": "phoneme_tokenizer",
                "vocab_list": list(config.tokens),
                "max_len": config.lyric_length,
                "max_sentence_per_structure": config.sentences,
                "mode": "sum",
            },
            "prompt_wav": {"type": "audio_tokenizer_wrapper", "max_len": config.prompt_length},
        },
    }

"""The ACE-Step family: what the trainer sees of it."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainer.codecs import dcae
from trainer.families import made_up
from trainer.families.ace_step.spec import AceStep
from trainer.families.base import Arrays, Batch, Example, Family, unwrapped
from trainer.families.padding import padded
from trainer.families.text_encoder import TextEncoder
from trainer.spec.errors import DataError
from trainer.spec.job import Prompt, Sampling
from trainer.weights import configuration

from .adapter import export_adapter
from .generate import Sampler, generate
from .lyrics import LyricTokenizer, open_lyric_tokenizer
from .network import AceStepNetwork, Conditions, Frames
from .objective import (
    TIMESTEPS,
    clean,
    noisy,
    squared_error,
    ssl_distance,
    timestep_index,
    training_sigmas,
)
from .text import dimmed, open_text_encoder
from .weights import PART, Release, load_network, open_release, save_network

TEXT_DROPOUT, LYRIC_DROPOUT = 0.15, 0.15
"""How often a song's tags and its lyrics are dropped in training (upstream's ``text2music_dataset.py``)."""
SSL = {"mert": 75.0, "mhubert": 50.0}
"""Arrays of self-supervised features, in the order of the projectors: frames per second."""
SSL_WEIGHT = 1.0
"""Of the mean over the SSL encoders (upstream's ``trainer.py``, ``ssl_coeff``)."""
EVALUATION_SEED = 0


class AceStepFamily(Family):
    """ACE-Step, configured by a job's ``model:`` section.

    Terms: ``mse`` of the latents, and with ``model.ssl_features`` ``ssl/mert`` and ``ssl/mhubert``.
    """

    frame_rate = dcae.Dcae.frame_rate
    codebooks = 0
    vocabulary = 0

    def __init__(self, model: AceStep) -> None:
        self.model = model
        self.segment_seconds = model.segment_seconds
        self.ssl = tuple(SSL) if model.ssl_features else ()
        self.terms: Mapping[str, float] = {"mse": 1.0, **{f"ssl/{name}": SSL_WEIGHT / len(SSL) for name in self.ssl}}

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels and bins of the autoencoder."""
        config = self.release.config
        return config.in_channels, config.patch_size[0]

    @classmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """Nothing but the family, known by a key that its transformer alone has."""
        told = {**configuration(url), **configuration(f"{url}/{PART}")}
        return {} if "lyric_encoder_vocab_size" in told else None

    def network(self) -> AceStepNetwork:
        """The network with the weights of ``model.pretrained``; what the objective never uses is frozen."""
        network = load_network(self.release)
        network.projectors.requires_grad_(self.model.ssl_features)
        return network

    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the network as the release's folder ``ace_step_transformer``; the text encoder stays where it is."""
        save_network(self.release, unwrapped(network, AceStepNetwork), folder, values)

    def export_adapter(self, folder: Path, to: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, see ``adapter.export_adapter``."""
        export_adapter(folder, to)

    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """``text_hidden`` [L, text_width], float16, of each song's tags; ``lyric_ids`` [M], int32, of its lyrics."""
        hidden = self._text([text.get("tags", "") for text in texts])
        ids = [self._lyrics(text.get("lyrics", "")) for text in texts]
        return [{"text_hidden": h, "lyric_ids": i} for h, i in zip(hidden, ids, strict=True)]

    def features(self) -> Mapping[str, tuple[float, int]]:
        """``mert`` and ``mhubert``, if ``model.ssl_features`` asks for them."""
        widths = dict(zip(SSL, self.release.config.ssl_latent_dims, strict=True)) if self.ssl else {}
        return {name: (SSL[name], width) for name, width in widths.items()}

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """``latents`` [B, 8, 16, T], ``inside`` [B, T], the conditions with their masks, SSL features; padded right.

        Raises:
            DataError: a song's lyrics are not of the network's vocabulary; SSL features are wanted and a song has none,
                or only those of more than its segment.
        """
        rows = [dict(example.arrays) for example in examples]
        for example in examples:
            self._check_lyrics(example)
        if training:
            for row, example in zip(rows, examples, strict=True):
                _drop(row, np.random.Generator(np.random.PCG64(example.seed)))
        latents, inside = padded([row["latents"] for row in rows])
        tensors = {"latents": latents, "inside": inside, **_condition_tensors(rows)}
        for name in self.ssl:
            for example in examples:
                _check_features(example, name, self.frame_rate)
            tensors[name], tensors[f"{name}_mask"] = padded([row[name] for row in rows], axis=0)
        frames = int(inside.sum())
        counts = {"mse": float(frames * latents[0, ..., 0].numel())}
        counts |= {f"ssl/{name}": float(tensors[f"{name}_mask"].sum()) for name in self.ssl}
        return Batch(tensors, counts, frames)

    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """``latents``, ``text_hidden``, ``lyric_ids``, and the SSL features that are asked for."""
        config = self.release.config
        seconds = frames / self.frame_rate
        features = zip(self.ssl, config.ssl_latent_dims if self.ssl else (), strict=True)
        return {
            "latents": made_up.latents(draw, *dcae.SHAPE, frames),
            "text_hidden": made_up.latents(draw, made_up.WORDS, config.text_embedding_dim),
            "lyric_ids": made_up.ids(draw, config.lyric_encoder_vocab_size),
            **{name: made_up.latents(draw, round(seconds * SSL[name]), width) for name, width in features},
        }

    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Squared error of the latents (``mse``) and ``1 - cosine`` of the SSL features (``ssl/…``)."""
        tensors = batch.tensors
        latents, inside = tensors["latents"].float(), tensors["inside"]
        dice = None if network.training else torch.Generator(latents.device).manual_seed(EVALUATION_SEED)
        draws = torch.randn(len(latents), generator=dice, device=latents.device)
        noise = torch.randn(latents.shape, generator=dice, device=latents.device)
        sigma = training_sigmas(self.model.shift).to(latents.device)[timestep_index(draws)]
        given = noisy(latents, noise, sigma)
        conditions, frames = self._conditions(tensors), Frames(inside, inside)
        velocity, guesses = network(given, TIMESTEPS * sigma, conditions, frames, project=bool(self.ssl))
        found = {"mse": squared_error(clean(given, velocity, sigma), latents, inside).sum()}
        for name, guess in zip(self.ssl, guesses, strict=True):
            features, there = tensors[name], tensors[f"{name}_mask"]
            songs = zip(guess, inside, features, there, strict=True)
            found[f"ssl/{name}"] = torch.stack([ssl_distance(g[i], f[t]) for g, i, f, t in songs]).sum()
        return found

    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """``latents`` [8, 16, T], float16, for the prompts' tags and lyrics; see ``generate.generate``."""
        frames = [max(int(prompt.seconds * self.frame_rate), 1) for prompt in prompts]
        device = next(network.parameters()).device
        rows = self.conditions([{"tags": prompt.tags, "lyrics": prompt.lyrics} for prompt in prompts])
        conditions = self._conditions({name: value.to(device) for name, value in _condition_tensors(rows).items()})
        dim_text, _ = padded(dimmed(self._text, [prompt.tags for prompt in prompts]), axis=0)
        _, inside = padded([np.zeros(count) for count in frames])
        inside = inside.to(device)
        noise = (drawn.to(device) for drawn in _noise([prompt.seed for prompt in prompts], frames))
        sampler = Sampler(shift=self.model.shift, **sampling.given)
        steps = generate(network, noise, conditions, dim_text.to(device), Frames(inside, inside), sampler)
        _, latents = deque(steps, maxlen=1).pop()
        songs = zip(latents.cpu().numpy().astype(np.float16), frames, strict=True)
        return [{"latents": song[..., :count]} for song, count in songs]

    @cached_property
    def release(self) -> Release:
        """Where the weights are, and their shape."""
        return open_release(self.model.pretrained)

    @cached_property
    def _text(self) -> TextEncoder:
        return open_text_encoder(self.release, self.model.text_encoder)

    @cached_property
    def _lyrics(self) -> LyricTokenizer:
        return open_lyric_tokenizer(self.release, self.model.lyric_vocabulary)

    def _check_lyrics(self, example: Example) -> None:
        ids, known = example.arrays["lyric_ids"], self.release.config.lyric_encoder_vocab_size
        if ids.size and not 0 <= ids.min() <= ids.max() < known:
            raise DataError(
                f"song {example.id} has lyric tokens {ids.min()} to {ids.max()}, the network knows 0 to {known - 1}",
                "prepare the dataset again with the vocabulary of this release (model.lyric_vocabulary)",
            )

    def _conditions(self, tensors: Mapping[str, Tensor]) -> Conditions:
        """Nobody sings: upstream trains with a zero speaker, and so its release knows no other."""
        names = ("text_hidden", "text_mask", "lyric_ids", "lyric_mask")
        text_hidden, text_mask, lyric_ids, lyric_mask = (tensors[name] for name in names)
        speaker = torch.zeros(len(text_hidden), self.release.config.speaker_embedding_dim, device=text_hidden.device)
        return Conditions(text_hidden, text_mask, text_mask.sum(1), lyric_ids, lyric_mask, speaker)


def _noise(seeds: Sequence[int], frames: Sequence[int]) -> Iterator[Tensor]:
    """Noise [B, 8, 16, T], again and again, each song's from its own seed; zeros beyond its frames."""
    dice = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
    while True:
        drawn = [die.standard_normal((*dcae.SHAPE, count), np.float32) for die, count in zip(dice, frames, strict=True)]
        yield padded(drawn)[0]


def _drop(row: dict[str, np.ndarray], dice: np.random.Generator) -> None:
    """Dropped tags are zeros that are still attended to; dropped lyrics are none."""
    text, lyrics = dice.random(2)
    if text < TEXT_DROPOUT:
        row["text_hidden"] = np.zeros_like(row["text_hidden"])
    if lyrics < LYRIC_DROPOUT:
        row["lyric_ids"] = row["lyric_ids"][:0]


def _condition_tensors(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """``text_hidden`` [B, L, text_width], ``lyric_ids`` [B, M] and their masks, ``L`` and ``M`` at least 1."""
    hidden, text_mask = padded([row["text_hidden"] for row in rows], axis=0)
    ids, lyric_mask = padded([row["lyric_ids"].astype(np.int64) for row in rows])
    return {"text_hidden": hidden, "text_mask": text_mask, "lyric_ids": ids, "lyric_mask": lyric_mask}


def _check_features(example: Example, name: str, frame_rate: float) -> None:
    if name not in example.arrays:
        raise DataError(
            f"song {example.id} has no {name} features, and model.ssl_features asks for them",
            f"put SONG.{name}.npy beside each song and prepare the dataset again, or leave out model.ssl_features",
        )
    seconds = example.arrays["latents"].shape[-1] / frame_rate
    found = len(example.arrays[name]) / SSL[name]
    if abs(found - seconds) > 1:
        raise DataError(
            f"song {example.id} is cut to {seconds:.0f} s, but its {name} features are those of {found:.0f} s",
            "raise model.segment_seconds above the longest song, or leave out model.ssl_features",
        )

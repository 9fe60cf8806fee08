"""The SongBloom family: what the trainer sees of it.

The network is imported where it is made or used: preparing songs does without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trainer.families import made_up
from trainer.families.base import Arrays, Autoregressive, Batch, Example, Predictions, unwrapped
from trainer.families.songbloom.spec import SongBloom
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.job import Prompt, Sampling
from trainer.weights import local_path

from .objective import draw
from .text import Vocabulary, lyric_batch, lyric_ids
from .weights import Release, is_release, load_network, open_release, save_network

if TYPE_CHECKING:
    from trainer.codecs.songbloom import SongBloomCodec

    from . import network as networks

FRAME_RATE = 25.0
"""Latents and sketch ids a second."""
FLOW_WEIGHT = 0.1
"""Of the flow's mean squared error (https://arxiv.org/abs/2506.07634, section 3)."""


class SongBloomFamily(Autoregressive):
    """SongBloom, configured by a job's ``model:`` section."""

    terms = {"ce": 1.0, "mse": FLOW_WEIGHT}  # noqa: RUF012  (a constant)
    frame_rate = FRAME_RATE
    codebooks = 1

    def __init__(self, model: SongBloom) -> None:
        self.model = model
        self.segment_seconds = model.segment_seconds

    @cached_property
    def vocabulary(self) -> int:
        """Entries of the sketch codebook."""
        return self.release.config.pitches

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels of the VAE."""
        return (self.release.config.latent_dim,)

    @classmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """Nothing but the family, known by the YAML beside its weights."""
        return {} if is_release(url) else None

    def network(self) -> "networks.SongBloom":
        """The network with the weights of ``model.pretrained``, on the CPU in fp32.

        Raises:
            UtaforgeError: segments are to be longer than what the release was trained on.
        """
        if self.segment_seconds > (most := self.release.config.max_seconds):
            raise UtaforgeError(
                f"model.segment_seconds: {self.segment_seconds:g} is more than the {most:g} s that "
                f"{self.model.pretrained} was trained on",
                f"write at most {most:g}",
            )
        return load_network(self.release)

    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the network as a release."""
        from . import network as networks

        save_network(self.release, unwrapped(network, networks.SongBloom), folder, values)

    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """``lyric_ids`` [L], int32, of each song's phonemised lyrics; what is lost is logged, by name."""
        positions = self.release.config.lyric_length
        return [
            {"lyric_ids": lyric_ids(self._vocabulary, text.get("lyrics", ""), positions).astype(np.int32)}
            for text in texts
        ]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """``lyrics`` [B, 3, L], ``prompt`` [B, frames, C], ``sketch`` [B, T], ``latents`` [B, C, T], ``length`` [B].

        Frames beyond the last whole block are left out; ``ends`` [B] says whose song is over then and was not cut. In
        training all conditions are dropped with probability ``model.cfg_dropout``, and else the style with the
        release's own.

        Raises:
            DataError: a sketch id or a lyric id is not in the network's tables.
        """
        config = self.release.config
        lengths = [example.arrays["sketch"].shape[-1] // config.block * config.block for example in examples]
        sketch = torch.full((len(examples), max(lengths)), config.eos)
        latents = torch.zeros(len(examples), config.latent_dim, max(lengths))
        prompt = torch.zeros(len(examples), config.prompt_length, config.latent_dim)
        lyrics: list[np.ndarray] = []
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            self._check(example)
            sketch[row, :length] = torch.from_numpy(example.arrays["sketch"][:length].astype(np.int64))
            latents[row, :, :length] = torch.from_numpy(example.arrays["latents"][:, :length].astype(np.float32))
            dice = np.random.default_rng(example.seed).random(2)
            nothing = training and dice[0] < self.model.cfg_dropout
            if not (nothing or (training and dice[1] < config.prompt_dropout)):
                _put(prompt[row], example.arrays["style"])
            ids = self._no_lyrics if nothing else self._vocabulary.annotate(example.arrays["lyric_ids"])
            lyrics.append(ids)
        frames = sum(lengths)
        tensors = {
            "lyrics": torch.from_numpy(lyric_batch(lyrics)),
            "prompt": prompt,
            "sketch": sketch,
            "latents": latents,
            "length": torch.tensor(lengths),
            "ends": torch.tensor([example.ends for example in examples]),
        }
        counts = {
            "ce": float(frames + sum(example.ends for example in examples)),
            "mse": float(frames * config.latent_dim),
        }
        return Batch(tensors, counts, frames)

    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """``sketch``, ``latents``, ``style`` and ``lyric_ids``."""
        config = self.release.config
        return {
            "sketch": made_up.codes(self, frames, draw)[0],
            "latents": made_up.latents(draw, config.latent_dim, frames),
            "style": made_up.latents(draw, config.latent_dim, config.prompt_length),
            "lyric_ids": made_up.ids(draw, len(config.tokens)),
        }

    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of sketch ids and the end (``ce``), squared error of the flow (``mse``)."""
        config = self.release.config
        length = batch.tensors["length"]
        shape = (batch.frames // config.block, config.block, config.latent_dim)
        draws = draw(shape, config.h_dropout, length.device, training=network.training)
        names = ("lyrics", "prompt", "sketch", "latents", "length", "ends")
        ce, mse = network("losses", *(batch.tensors[name] for name in names), draws)
        return {"ce": ce, "mse": mse}

    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """``sketch`` [T] and ``latents`` [C, T] for the prompts' lyrics and style; see ``generate.generate``.

        Raises:
            DataError: a style cannot be heard.
            UtaforgeError: a style is given, but no VAE to read it with.
        """
        from .generate import SeededDraws, Settings, generate

        config = self.release.config
        conditions = self.conditions([{"lyrics": prompt.lyrics} for prompt in prompts])
        lyrics = [self._vocabulary.annotate(told["lyric_ids"]) for told in conditions]
        lyrics += [self._no_lyrics] * len(prompts)
        prompt = torch.zeros(len(prompts), config.prompt_length, config.latent_dim)
        for row, told in enumerate(prompts):
            if told.style:
                _put(prompt[row], self._style(told.style))
        asked = sampling.given
        guidance = asked.pop("guidance")
        settings = Settings(guidance, guidance, **asked)
        frames = [max(round(prompt.seconds * FRAME_RATE), 1) for prompt in prompts]
        draws = [SeededDraws(prompt.seed) for prompt in prompts]
        songs = generate(network, torch.from_numpy(lyric_batch(lyrics)), prompt, frames, draws, settings)
        return [{"sketch": sketch.astype(np.uint16), "latents": latents} for sketch, latents in songs]

    def greedy(self, network: nn.Module, example: Example, frames: int) -> Batch:
        """As ``collate`` makes it of sketch and latents; neither guidance nor penalty, a few Euler steps a block.

        Raises:
            DataError: the song ends within its first block.
        """
        from .generate import SeededDraws, Settings, generate

        lyrics = lyric_batch([self._vocabulary.annotate(example.arrays["lyric_ids"]), self._no_lyrics])
        style = self.collate([example], training=False).tensors["prompt"]
        settings = Settings(1, 1, temperature=1, top_k=1, steps=4, flow_temperature=1, repetition_penalty=1)
        draws = [SeededDraws(example.seed)]
        ((sketch, latents),) = generate(network, torch.from_numpy(lyrics), style, [frames], draws, settings)
        if not len(sketch):
            raise DataError(f"song {example.id}: the network ends it within the first block", "test with other songs")
        song = replace(example, arrays={**example.arrays, "sketch": sketch, "latents": latents})
        return self.collate([song], training=False)

    def predictions(self, network: nn.Module, batch: Batch) -> list[Predictions]:
        """Of the sketch; its end is left out."""
        from . import network as networks

        core = unwrapped(network, networks.SongBloom)
        lyrics, prompt, sketch, latents = (batch.tensors[n] for n in ("lyrics", "prompt", "sketch", "latents"))
        states = core.plan(core.condition_provider(lyrics, prompt), sketch, latents).states[0, :-1]
        frames = torch.arange(len(states), device=states.device)
        return [Predictions(core.skeleton_classifier(states), sketch[0], frames)]

    @cached_property
    def release(self) -> Release:
        """Where the weights are, and their shape."""
        return open_release(self.model.pretrained)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.release.config.tokens, self.release.config.sentences)

    @cached_property
    def _no_lyrics(self) -> np.ndarray:
        """What upstream's guidance makes of a song without lyrics: the empty token in sentence 1."""
        return self._vocabulary.annotate(self._vocabulary.encode("")[0])

    @cached_property
    def _codec(self) -> "SongBloomCodec":
        from trainer.codecs.songbloom import SongBloomCodec

        return SongBloomCodec.open(self.model)

    def _style(self, url: str) -> np.ndarray:
        from trainer.audio.decode import load

        file = local_path(url, "validation.prompts.style")
        return self._codec.style(load(file, self._codec.sample_rate, self._codec.channels))

    def _check(self, example: Example) -> None:
        frames, block = example.arrays["sketch"].shape[-1], self.release.config.block
        if frames < block:
            raise DataError(f"song {example.id}: has {frames} frames, a block is {block}", "leave it out")
        for name, size in (("sketch", self.vocabulary), ("lyric_ids", len(self.release.config.tokens))):
            ids = example.arrays[name]
            if ids.size and not (ids.min() >= 0 and ids.max() < size):
                raise DataError(
                    f"song {example.id}: {name} holds {ids.min()} to {ids.max()}, the network knows 0 to {size - 1}",
                    "prepare the songs with this network's own vocabulary and sketch codebook",
                )


def _put(prompt: Tensor, style: np.ndarray) -> None:
    """Write latents [C, frames] into a row of the batch, cut if too long."""
    frames = torch.from_numpy(style.astype(np.float32)).T[: len(prompt)]
    prompt[: len(frames)] = frames

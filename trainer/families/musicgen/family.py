"""The MusicGen family: what the trainer sees of it.

The network is imported where it is made or used: preparing songs does without transformers, whose import takes seconds.
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
from trainer.families.cross_entropy import NO_LABEL
from trainer.families.musicgen.spec import MusicGen
from trainer.families.padding import padded
from trainer.families.text_encoder import TextEncoder
from trainer.spec.errors import DataError
from trainer.spec.job import Prompt, Sampling
from trainer.weights import configuration

from .objective import delay
from .text import open_text_encoder
from .weights import Release, load_network, open_release, save_network

if TYPE_CHECKING:
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    from .network import MusicGenNetwork

FRAME_RATE = 50.0
"""Frames per second, of EnCodec at 32 kHz and of the pocket codec alike."""


class MusicGenFamily(Autoregressive):
    """MusicGen, configured by a job's ``model:`` section.

    The loss is ``ce``; ``ce/0`` … ``ce/3``, one per codebook, are for the eye.
    """

    frame_rate = FRAME_RATE

    def __init__(self, model: MusicGen) -> None:
        self.model = model
        self.segment_seconds = model.segment_seconds

    @cached_property
    def terms(self) -> Mapping[str, float]:
        """``ce`` counts; the codebooks' own terms have no weight."""
        return {"ce": 1.0, **{f"ce/{k}": 0.0 for k in range(self.codebooks)}}

    @property
    def codebooks(self) -> int:
        """Of the network's configuration."""
        return self._config.num_codebooks

    @property
    def vocabulary(self) -> int:
        """Of the network's configuration."""
        return self._config.vocab_size

    @classmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """Nothing but the family, known by ``model_type``."""
        own = url == "builtin:pocket" or configuration(url).get("model_type") == "musicgen"
        return {} if own else None

    def network(self) -> "MusicGenNetwork":
        """The network with the weights of ``model.pretrained``, on the CPU in fp32."""
        return load_network(self.release, self.model.dropout)

    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the network in the format of the official release."""
        from .network import MusicGenNetwork

        save_network(self.release, unwrapped(network, MusicGenNetwork), folder, values)

    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """``text_hidden`` [L, text_width], float16, of each song's tags."""
        return [{"text_hidden": hidden} for hidden in self._text([text.get("tags", "") for text in texts])]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """``codes`` [B, K, T], ``length`` [B], ``text_hidden`` [B, L, text_width], ``text_mask`` [B, L]; padded right.

        Raises:
            DataError: a song has more frames than the network has positions.
        """
        for example in examples:
            self._check_length(example.arrays["codes"].shape[-1], f"song {example.id}")
        codes, inside = padded([example.arrays["codes"].astype(np.int64) for example in examples])
        hidden, mask = padded([example.arrays["text_hidden"] for example in examples], axis=0)
        if training:
            draws = [np.random.Generator(np.random.PCG64(example.seed)).random() for example in examples]
            mask &= torch.tensor([draw >= self.model.cfg_dropout for draw in draws])[:, None]
        frames = int(inside.sum())
        tensors = {"codes": codes, "length": inside.sum(1), "text_hidden": hidden, "text_mask": mask}
        counts = {term: float(frames * self.codebooks if term == "ce" else frames) for term in self.terms}
        return Batch(tensors, counts, frames)

    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """``codes`` and ``text_hidden``."""
        hidden = made_up.latents(draw, made_up.WORDS, self.release.text_width)
        return {"codes": made_up.codes(self, frames, draw), "text_hidden": hidden}

    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy summed over all codebooks (``ce``) and over each (``ce/k``)."""
        codes, length, hidden, mask = (batch.tensors[n] for n in ("codes", "length", "text_hidden", "text_mask"))
        ids, labels = delay(codes, length, self.vocabulary)
        books = network(ids, hidden, mask, labels=labels)
        return {"ce": books.sum(), **{f"ce/{k}": value.detach() for k, value in enumerate(books)}}

    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """``codes`` [K, T] for the prompts' tags; see ``generate.generate``.

        Raises:
            DataError: a prompt is longer than the network has positions.
        """
        from .generate import generate

        frames = [max(round(prompt.seconds * FRAME_RATE), 1) for prompt in prompts]
        for index, count in enumerate(frames):
            self._check_length(count, f"prompt {index + 1}")
        conditions = self.conditions([{"tags": prompt.tags} for prompt in prompts])
        text = padded([condition["text_hidden"] for condition in conditions], axis=0)
        seeds = [prompt.seed for prompt in prompts]
        return [{"codes": codes} for codes in generate(network, frames, seeds, *text, **sampling.given)]

    def greedy(self, network: nn.Module, example: Example, frames: int) -> Batch:
        """As ``collate`` makes it."""
        from .generate import generate

        text = padded([example.arrays["text_hidden"]], axis=0)
        greedy = {"guidance": 1.0, "temperature": 1.0, "top_k": 1}
        (codes,) = generate(network, [frames], [example.seed], *text, **greedy)
        return self.collate([replace(example, arrays={**example.arrays, "codes": codes})], training=False)

    def predictions(self, network: nn.Module, batch: Batch) -> list[Predictions]:
        """A step of the delay pattern sees as many frames of the first codebook as there are steps before it."""
        codes, length, hidden, mask = (batch.tensors[n] for n in ("codes", "length", "text_hidden", "text_mask"))
        ids, labels = delay(codes, length, self.vocabulary)
        there = labels != NO_LABEL
        steps = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
        return [Predictions(network(ids, hidden, mask)[there], labels[there], steps[there])]

    @cached_property
    def release(self) -> Release:
        """Where the weights are, and their shape."""
        return open_release(self.model.pretrained)

    @cached_property
    def _text(self) -> TextEncoder:
        return open_text_encoder(self.release, self.model.text_encoder)

    @cached_property
    def _config(self) -> "MusicgenDecoderConfig":
        return self.release.decoder_config(self.model.dropout)

    def _check_length(self, frames: int, whose: str) -> None:
        most = self._config.max_position_embeddings - self.codebooks + 1
        if frames > most:
            raise DataError(
                f"{whose} has {frames} frames ({frames / FRAME_RATE:.1f} s), the network has positions for {most}",
                f"ask for at most {most / FRAME_RATE:.1f} s (model.segment_seconds, validation.prompts.seconds)",
            )

"""What a family is to the rest of the trainer: one object, made lazily by the registry."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from trainer.shapes import Float, Int
from trainer.spec.errors import UtaforgeError
from trainer.spec.job import Prompt, Sampling

Network = TypeVar("Network", bound=nn.Module)
Arrays = Mapping[str, np.ndarray]
"""Arrays of a shard row by name: ``codes`` [K, T], ``latents`` [..., T], …."""


@dataclass(frozen=True)
class Example:
    """One song, or a segment of one, as the loader hands it over.

    Attributes:
        id: the song's id in its dataset.
        arrays: of the shard row, those with a time axis already cut to the segment.
        text: ``tags``, ``lyrics``, ….
        seed: of every random draw made for this visit of this song (dropouts); follows from the plan alone.
        ends: the song's last frame is in it.
    """

    id: str
    arrays: Arrays
    text: Mapping[str, str]
    seed: int
    ends: bool = True


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the network.

    Attributes:
        tensors: by name; first axis ``B``.
        counts: valid tokens of each loss term, known before the forward pass, so that the engine can normalise by the
            *global* count of the optimizer step.
        frames: audio frames in it, padding not counted.
    """

    tensors: dict[str, Tensor]
    counts: dict[str, float]
    frames: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}, self.counts, self.frames)


class Family(ABC):
    """One model family, configured by a job's ``model:`` section. Holds no weights itself."""

    terms: Mapping[str, float]
    """Loss terms and their weights: total = Σ weight · sum / count."""
    frame_rate: float
    """Frames per second of the codes or latents."""
    codebooks: int
    """Of the codes; 0 for latents alone."""
    vocabulary: int
    """Codes that the network knows, in each codebook; 0 for latents alone."""
    latent_shape: tuple[int, ...] = ()
    """Of the latents, without their time axis; empty for codes alone."""
    segment_seconds: float
    """Longer songs are cut into segments of at most this length."""

    @classmethod
    @abstractmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """What the release at ``url`` itself says of a job's ``model:`` section; None if it is another family's."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network with the weights of ``model.pretrained``, on the CPU in fp32, strictly loaded."""

    @abstractmethod
    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write ``network`` into ``folder`` as a release that ``model.pretrained`` can name.

        Args:
            network: as ``network()`` gave it.
            folder: is made.
            values: trained parameters by name, where those in ``network`` are sharded or rounded.
        """

    @abstractmethod
    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """Arrays computed from each song's text by a frozen encoder; ``prepare`` stores them in the shards."""

    def features(self) -> Mapping[str, tuple[float, int]]:
        """Frames a second and width ``W``, by name, of arrays [L, W] that a song has to bring, as ``SONG.NAME.npy``."""
        return {}

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """A micro-batch. Dropouts of conditions are drawn here, from each example's seed, and only if ``training``."""

    @abstractmethod
    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of a shard row with random ids, latents and conditions, ``frames`` long (``families.made_up``)."""

    @abstractmethod
    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss *sums* by term (scalars, fp32); divide by ``batch.counts`` for means."""

    @abstractmethod
    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """What the codec decodes, for each prompt; one batch, each song a matter of its own prompt and seed alone.

        Args:
            network: in eval mode.
            prompts: what is asked for.
            sampling: as a resolved job has it: every field that the family listens to, and no other.
        """

    def export_adapter(self, folder: Path, to: Path) -> None:
        """Write PEFT's adapter in ``folder`` into the folder ``to``, as the files that upstream's programs load.

        Raises:
            UtaforgeError: upstream has no such format, or it cannot express the adapter.
        """
        raise UtaforgeError(
            "upstream has no adapter format for this family",
            "load PEFT's adapter, which is in the run's folder adapter, or write whole weights: utaforge merge",
        )


@dataclass(frozen=True)
class Predictions:
    """What a network says of the ids of one song, all of them seen at once, as in training.

    Attributes:
        logits: of each prediction.
        ids: that were to be predicted.
        seen: frames, from the song's first, on which a prediction may depend.
    """

    logits: Float[Tensor, "N V"]
    ids: Int[Tensor, " N"]
    seen: Int[Tensor, " N"]


class Autoregressive(Family):
    """A family that makes a song id after id; ``trainer.selftest`` compares how it does with how it is trained."""

    @abstractmethod
    def greedy(self, network: nn.Module, example: Example, frames: int) -> Batch:
        """A batch of one song with the text of ``example``, made with the cache of the likeliest ids alone.

        Args:
            network: in eval mode.
            example: whose conditions are kept; its song does not matter.
            frames: the most that are made.
        """

    @abstractmethod
    def predictions(self, network: nn.Module, batch: Batch) -> list[Predictions]:
        """What ``network`` says of the ids of a batch of one song in one pass, for each vocabulary."""


def unwrapped(network: nn.Module, kind: type[Network]) -> Network:
    """The family's own network inside whatever PEFT, DDP or DeepSpeed have put around it."""
    return next(module for module in network.modules() if isinstance(module, kind))

"""What is learned: the sketch by cross entropy, the latents of each block by rectified flow.

``total = ce + 0.1 · mse`` (https://arxiv.org/abs/2506.07634, section 3; upstream publishes no training code). The flow
goes from latents (t = 0) to noise (t = 1): ``z = (1 - t) x + t ε``, target ``ε - x``
(https://arxiv.org/abs/2209.03003), with ``t`` logit-normal (https://arxiv.org/abs/2403.03206).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.families.cross_entropy import NO_LABEL, chunked_sum, labelled
from trainer.shapes import Bool, Float, Int

EVALUATION_SEED = 0


class Draws(NamedTuple):
    """Random numbers of each valid block, song after song.

    Attributes:
        t: times of the flow.
        noise: of the flow.
        keep_h: where the DiT is told the planner's ``h``.
        keep_sketch: where it is told the sketch.
    """

    t: Float[Tensor, " N"]
    noise: Float[Tensor, "N P C"]
    keep_h: Bool[Tensor, " N"]
    keep_sketch: Bool[Tensor, " N"]


class Flow(NamedTuple):
    """What the DiT is given of each valid block, and what it should say."""

    previous: Float[Tensor, "N P C"]
    noised: Float[Tensor, "N P C"]
    target: Float[Tensor, "N P C"]


def draw(shape: tuple[int, int, int], dropout: float, device: torch.device, *, training: bool) -> Draws:
    """Draws for ``shape``: N, P, C. In evaluation they are always the same and nothing is dropped."""
    generator = None if training else torch.Generator(device).manual_seed(EVALUATION_SEED)
    blocks = shape[0]
    t = torch.randn(blocks, device=device, generator=generator).sigmoid()
    noise = torch.randn(shape, device=device, generator=generator)
    keep = torch.rand(2, blocks, device=device, generator=generator) >= (dropout if training else 0.0)
    return Draws(t, noise, keep[0], keep[1])


def labels_of(
    sketch: Int[Tensor, "B T"], length: Int[Tensor, " B"], ends: Bool[Tensor, " B"], eos: int
) -> Int[Tensor, "B T+1"]:
    """Each frame's id, then ``eos`` if the song ends there and was not cut, then ``NO_LABEL``."""
    places = torch.arange(sketch.shape[1] + 1, device=sketch.device)
    labels = functional.pad(sketch, (0, 1)).masked_fill(places == length[:, None], eos)
    return labels.masked_fill(places >= (length + ends)[:, None], NO_LABEL)


def cross_entropy_sum(
    states: Float[Tensor, "B T+1 D"], labels: Int[Tensor, "B T+1"], head: nn.Module, vocabulary: int
) -> Float[Tensor, ""]:
    """Summed cross entropy where there are labels."""
    places, wanted = labelled(labels)
    return chunked_sum(states.flatten(0, 1)[places], wanted, head, vocabulary)


def valid_blocks(length: Int[Tensor, " B"], blocks: int, size: int) -> Bool[Tensor, "B n"]:
    """Which blocks lie within each row's length."""
    return torch.arange(blocks, device=length.device) < (length // size)[:, None]


def flow_pairs(
    latents: Float[Tensor, "B C T"],
    valid: Bool[Tensor, "B n"],
    t: Float[Tensor, " N"],
    noise: Float[Tensor, "N P C"],
) -> Flow:
    """Of each valid block: the block before it (zeros before the first), itself noised, and the flow to predict."""
    blocks = latents.transpose(1, 2).unflatten(1, (valid.shape[1], -1))
    previous = functional.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0))[valid]
    clean, mix = blocks[valid], t[:, None, None]
    return Flow(previous, (1 - mix) * clean + mix * noise, noise - clean)

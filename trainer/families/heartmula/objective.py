"""Next-frame prediction: codebook 0 by the backbone, the others by the depth decoder.

Upstream publishes no training code. This is its inference, teacher-forced: a frame's context is the backbone's hidden
state one row before it; the depth decoder sees that context and the frame's codes so far (``generate_frame`` in
``src/heartlib/heartmula/modeling_heartmula.py``, HeartMuLa/heartlib@3981c52). The loss is the cross entropy of codebook
0 plus the mean of the others'. Training the depth decoder on a share of the frames is CSM's
(https://www.sesame.com/research/crossing_the_uncanny_valley_of_voice).
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from trainer.families.cross_entropy import chunked_sum
from trainer.shapes import Bool, Float, Int

if TYPE_CHECKING:
    from .network import HeartMuLaNetwork


def song_rows(
    prompt: Int[Tensor, "P K1"], codes: Int[Tensor, "K T"], end: int | None
) -> tuple[Int[Tensor, "S K1"], Bool[Tensor, "S K1"]]:
    """Rows of a song, and which of their columns count: its prompt, its frames and a frame of ``end`` after the last.

    Args:
        prompt: rows of text.
        codes: of the frames.
        end: the id that ends a song; None if the song goes on.
    """
    if end is not None:
        codes = functional.pad(codes, (0, 1), value=end)
    tokens = torch.cat([prompt, functional.pad(codes.T, (0, 1))])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[: len(prompt), -1] = mask[len(prompt) :, :-1] = True
    return tokens, mask


def cross_entropy_sums(
    network: "HeartMuLaNetwork",
    hidden: Float[Tensor, "B S D"],
    tokens: Int[Tensor, "B S K1"],
    frames: Bool[Tensor, "B S"],
    depth: Bool[Tensor, "B S"],
) -> Float[Tensor, " K"]:
    """Summed cross entropy of each codebook, fp32: of the first over ``frames``, of the others over ``depth``."""
    vocabulary = network.config.audio_vocab_size
    context, codes = contexts(hidden, tokens, frames)
    sums = [chunked_sum(context, codes[:, 0], partial(network.logits, 0), vocabulary)]
    context, codes = contexts(hidden, tokens, depth)
    inner = network.depth(context, codes[:, :-1])
    sums += [
        chunked_sum(inner[:, book], codes[:, book], partial(network.logits, book), vocabulary)
        for book in range(1, codes.shape[1])
    ]
    return torch.stack(sums)


def contexts(
    hidden: Float[Tensor, "B S D"], tokens: Int[Tensor, "B S K1"], frames: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, "N D"], Int[Tensor, "N K"]]:
    """Hidden state before each of ``frames``, and its codes."""
    song, row = frames.nonzero(as_tuple=True)
    return hidden[song, row - 1], tokens[song, row, :-1]

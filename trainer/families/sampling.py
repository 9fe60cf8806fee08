"""Random numbers of songs, and ids drawn with them.

Every song has numbers of its own, drawn from its seed before anything else, so that it does not depend on what else is
in the batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.shapes import Float, Int


def draw_table(lengths: Sequence[int], seeds: Sequence[int], ids: int) -> Float[Tensor, "B S ids"]:
    """Uniform numbers in [0, 1) for ``lengths[b]`` steps of ``ids`` each, each song's from its own seed; float64."""
    table = np.zeros((len(lengths), max(lengths), ids))
    for row, count, seed in zip(table, lengths, seeds, strict=True):
        row[:count] = np.random.Generator(np.random.PCG64(seed)).random((count, ids))
    return torch.from_numpy(table)


def sample(
    logits: Float[Tensor, "*B V"], draws: Float[Tensor, "*B"], temperature: float, top_k: int
) -> Int[Tensor, "*B"]:
    """An id of each row, among the ``top_k`` likeliest (0: among all)."""
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return passed(logits.softmax(-1), draws)


def passed(probabilities: Float[Tensor, "*B V"], draws: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Where the cumulative probability passes the number drawn."""
    reached = probabilities.cumsum(-1)
    wanted = draws[..., None] * reached[..., -1:]
    return torch.searchsorted(reached, wanted, right=True).squeeze(-1).clamp(max=reached.shape[-1] - 1)

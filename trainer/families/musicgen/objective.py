"""The delay pattern and its cross entropy.

Codebook ``k`` is delayed by ``k`` frames, so that a song of ``T`` frames is a sequence of ``S = T + K - 1`` and every
code is predicted (Copet et al. 2023, https://arxiv.org/abs/2306.05284, figure 1). The loss is the mean over codebooks
of the mean over frames; all codebooks have equally many frames, so it is one sum over one count.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

NO_LABEL = -100
CHUNK = 8192
"""Positions whose logits exist at the same time, in one codebook."""


def delay(
    codes: Int[Tensor, "B K T"], length: Int[Tensor, " B"], pad: int
) -> tuple[Int[Tensor, "B K S"], Int[Tensor, "B K S"]]:
    """Inputs and labels of a batch padded on the right.

    Args:
        codes: codes; what stands beyond a row's length does not matter.
        length: frames of each row.
        pad: input id where there is no code.

    Returns:
        Inputs (the labels shifted right by one, ``pad`` where there is none) and labels (``NO_LABEL`` where none).
    """
    batch, books, frames = codes.shape
    valid = torch.arange(frames, device=codes.device) < length[:, None]
    labels = codes.new_full((batch, books, frames + books - 1), NO_LABEL)
    for k in range(books):
        labels[:, k, k : k + frames] = torch.where(valid, codes[:, k], NO_LABEL)
    ids = functional.pad(labels[..., :-1], (1, 0), value=NO_LABEL)
    return ids.masked_fill(ids == NO_LABEL, pad), labels


def labelled(labels: Int[Tensor, "B K S"]) -> list[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """For each codebook, where labels are (indices into ``B·S``) and what they are."""
    flat = labels.transpose(0, 1).flatten(1)
    places = [row.ne(NO_LABEL).nonzero().squeeze(1) for row in flat]
    return [(place, row[place]) for place, row in zip(places, flat, strict=True)]


def cross_entropy_sums(
    hidden: Float[Tensor, "B S D"],
    targets: Iterable[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]],
    heads: Iterable[nn.Module],
) -> Float[Tensor, " K"]:
    """Summed cross entropy of each codebook, fp32; logits are made only where there are targets, a chunk at a time."""
    flat = hidden.flatten(0, 1)
    return torch.stack(
        [_book_sum(flat[places], wanted, head) for (places, wanted), head in zip(targets, heads, strict=True)]
    )


def _book_sum(hidden: Tensor, wanted: Tensor, head: nn.Module) -> Tensor:
    if len(wanted) <= CHUNK:
        return _chunk_sum(hidden, wanted, head)
    chunks = zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
    sums = [checkpoint(_chunk_sum, *chunk, head, use_reentrant=False) for chunk in chunks]
    return torch.stack([value for value in sums if value is not None]).sum()


def _chunk_sum(hidden: Tensor, wanted: Tensor, head: nn.Module) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), wanted, reduction="sum")

"""The delay pattern and its cross entropy.

Codebook ``k`` is delayed by ``k`` frames, so that a song of ``T`` frames is a sequence of ``S = T + K - 1`` and every
code is predicted (Copet et al. 2023, https://arxiv.org/abs/2306.05284, figure 1). The loss is the mean over codebooks
of the mean over frames; all codebooks have equally many frames, so it is one sum over one count.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.families.cross_entropy import NO_LABEL, chunked_sum
from trainer.shapes import Float, Int


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


def cross_entropy_sums(
    hidden: Float[Tensor, "B S D"],
    books: Iterable[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]],
    heads: Iterable[nn.Module],
    vocabulary: int,
) -> Float[Tensor, " K"]:
    """Summed cross entropy of each codebook, fp32; logits are made only where there are labels, a chunk at a time.

    Args:
        hidden: of the decoder.
        books: what ``labelled`` says of each codebook's labels.
        heads: of each codebook.
        vocabulary: codes in one codebook.
    """
    flat = hidden.flatten(0, 1)
    return torch.stack(
        [
            chunked_sum(flat[places], wanted, head, vocabulary)
            for (places, wanted), head in zip(books, heads, strict=True)
        ]
    )

"""Cross entropy of large vocabularies: logits exist only where there are labels, a chunk of positions at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.shapes import Float, Int

NO_LABEL = -100
CHUNK_BYTES = 64 << 20
"""Of fp32 logits that exist at the same time."""


def chunked_sum(
    hidden: Float[Tensor, "N D"], labels: Int[Tensor, " N"], head: Callable[[Tensor], Tensor], vocabulary: int
) -> Float[Tensor, ""]:
    """Summed cross entropy of ``head(hidden)`` against ``labels``, in fp32.

    Beyond one chunk, logits are made again in the backward pass, so ``head`` may be an adapted layer.

    Args:
        hidden: what the head sees, one row a label.
        labels: all of them labels; choose the rows with ``labelled`` first.
        head: hidden states → logits.
        vocabulary: logits of one row.
    """
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    if len(labels) <= rows:
        return _sum(hidden, labels, head)
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    sums = [checkpoint(_sum, *chunk, head, use_reentrant=False) for chunk in chunks]
    return torch.stack([value for value in sums if value is not None]).sum()


def labelled(labels: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Where there are labels (indices into the flat tensor), and what they are."""
    flat = labels.flatten()
    places = flat.ne(NO_LABEL).nonzero().squeeze(1)
    return places, flat[places]


def _sum(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), labels, reduction="sum")

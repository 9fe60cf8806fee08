"""Arrays of different lengths as one batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.shapes import Bool


def padded(arrays: Sequence[np.ndarray], axis: int = -1) -> tuple[Tensor, Bool[Tensor, "B L"]]:
    """``arrays`` stacked, each filled up with zeros at the end of ``axis``; and where they are not filling.

    ``L`` is the length of the longest, at least 1.
    """
    lengths = torch.tensor([array.shape[axis] for array in arrays])
    most = max(int(lengths.max()), 1)
    ends = [torch.tensor(array).movedim(axis, -1) for array in arrays]
    rows = [functional.pad(end, (0, most - end.shape[-1])).movedim(-1, axis) for end in ends]
    return torch.stack(rows), torch.arange(most) < lengths[:, None]

"""Bytes per rank: weights, gradients, optimizer, activations.

Model states after ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3), with the engine's types:
what is trained is kept in fp32 (4 bytes of weight, 4 of gradient, 8 of Adam's moments), what is frozen in the precision
it computes in. Activations after Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.1, without its
attention-score term (the kernels used here never store scores) and without dropout masks, with cross-attention added.
"""

from dataclasses import dataclass, replace
from typing import Literal

from trainer.spec.family import BYTES, Dims

Strategy = Literal["ddp", "zero2", "zero3"]
Precision = Literal["fp32", "bf16", "fp16"]
FP32 = 4
MOMENTS = 2
LOGITS_CHUNK = 8192
"""Positions whose logits exist at once (``trainer.families.musicgen.objective.CHUNK``)."""
LOGITS_COPIES = 3
"""Logits, their softmax and its gradient."""
GPU_OVERHEAD_BYTES = 1 << 30
"""CUDA context, NCCL buffers, cuBLAS workspaces."""
CPU_OVERHEAD_BYTES = 3 << 29
"""Python with torch, transformers and Ray, in each process."""
FRAGMENTATION = 0.1
"""Share of the activations that an allocator loses."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part.

    Attributes:
        weights: trained and frozen.
        gradients: of what is trained.
        optimizer: moments, and ZeRO's own copy of the weights.
        activations: kept between forward and backward pass of one micro-batch, logits included.
        overhead: libraries, buffers, fragmentation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


@dataclass(frozen=True)
class Load:
    """What one rank has to hold.

    Attributes:
        dims: of the network.
        trained: parameters that are trained.
        frozen: parameters that are not.
        adapted: modules with an adapter in each layer; each keeps its input once more.
        precision: of the computation.
        strategy: how states are spread over the ranks.
        ranks: how many.
        positions: of a micro-batch: songs × frames, padding included.
        checkpointing: only each layer's input is kept, and one layer at a time computed again.
        gpu: on a GPU, not a CPU.
    """

    dims: Dims
    trained: int
    frozen: int
    adapted: int
    precision: Precision
    strategy: Strategy
    ranks: int
    positions: int
    checkpointing: bool
    gpu: bool


def memory(load: Load) -> Memory:
    """Bytes that one rank needs."""
    shares = load.ranks if load.strategy == "zero3" else 1
    weights = (load.trained * FP32 + load.frozen * BYTES[load.precision]) // shares
    gradients = load.trained * FP32 // (1 if load.strategy == "ddp" else load.ranks)
    moments = load.trained * FP32 * MOMENTS
    optimizer = moments if load.strategy == "ddp" else (moments + load.trained * FP32) // load.ranks
    kept = activations(load)
    overhead = (GPU_OVERHEAD_BYTES if load.gpu else CPU_OVERHEAD_BYTES) + int(FRAGMENTATION * kept)
    return Memory(weights, gradients, optimizer, kept, overhead)


def activations(load: Load) -> int:
    """Bytes kept for the backward pass.

    A layer keeps, in units of one position's residual stream: self-attention 6 (norm's input and output, q, k, v,
    result), cross-attention 4 (norm's input and output, q, result), feed-forward 2 + 2·ffn/width, and 1 for each
    adapted module.
    """
    dims = load.dims
    units = 12 + 2 * dims.ffn / dims.width + load.adapted
    unit = load.positions * dims.width * BYTES[load.precision]
    layers = (dims.layers + units) if load.checkpointing else dims.layers * units
    logits = min(load.positions, LOGITS_CHUNK) * dims.vocabulary * FP32 * LOGITS_COPIES
    return int(layers * unit) + logits


def most_positions(load: Load, budget: int) -> int:
    """The most positions in a micro-batch with which ``load`` stays within ``budget`` bytes; 0 if nothing does."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        if memory(replace(load, positions=middle)).total <= budget:
            low = middle
        else:
            high = middle - 1
    return low

"""SongBloom's two transformers: a Llama that plans (causal) and a DiT that renders (within a block).

Legend: ``B`` batch, ``S`` sequence, ``D`` width, ``H`` heads, ``R`` half of the rotated part of a head.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.shapes import Float

RMS_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
FLOW_ROTARY_BASE = 20_000.0
FLOW_ROTARY_LEAST = 32
"""The DiT rotates half of each head, but at least this many dimensions (upstream's transformer.py@ef78022)."""

Rotation = tuple[Float[Tensor, "S R"], Float[Tensor, "S R"]]
"""Cosines and sines by position."""
_recomputed = partial(checkpoint, use_reentrant=False)


class Cache:
    """Keys and values of everything that the planner has read.

    Args:
        positions: the longest sequence.
    """

    def __init__(self, positions: int) -> None:
        self.length = 0
        self._positions = positions
        self._kept: list[tuple[Tensor, Tensor]] = []

    def extend(
        self, layer: int, keys: Float[Tensor, "B H S d"], values: Float[Tensor, "B H S d"]
    ) -> tuple[Float[Tensor, "B H N d"], Float[Tensor, "B H N d"]]:
        """Keep these and return all of them; ``length`` moves on when the last layer has been here."""
        if layer == len(self._kept):
            shape = (*keys.shape[:2], self._positions, keys.shape[3])
            self._kept.append((keys.new_empty(shape), values.new_empty(shape)))
        end = self.length + keys.shape[2]
        for kept, new in zip(self._kept[layer], (keys, values), strict=True):
            kept[:, :, self.length : end] = new
        kept_keys, kept_values = self._kept[layer]
        return kept_keys[:, :, :end], kept_values[:, :, :end]


class Llama(nn.Module):
    """Causal transformer under the names of ``transformers``' ``LlamaModel``, without token embeddings."""

    def __init__(self, dim: int, heads: int, ffn: int, layers: int, rotary_base: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(dim, heads, ffn, index) for index in range(layers))
        self.norm = RMSNorm(dim)
        self.rotary_base, self.rotated = rotary_base, dim // heads
        self.checkpointing = False

    def forward(self, x: Float[Tensor, "B S D"], cache: Cache | None = None) -> Float[Tensor, "B S D"]:
        """Hidden states after the last norm. With a ``cache``, ``x`` continues it, one position at a time."""
        start = cache.length if cache else 0
        rotation = rotary(start, x.shape[1], self.rotated, self.rotary_base, x.device)
        x = _run(self.layers, self.checkpointing and self.training, x, rotation, cache)
        if cache:
            cache.length += x.shape[1]
        return self.norm(x)


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each after an RMS norm."""

    def __init__(self, dim: int, heads: int, ffn: int, index: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(dim, heads, index)
        self.mlp = GatedMLP(dim, ffn)
        self.input_layernorm = RMSNorm(dim)
        self.post_attention_layernorm = RMSNorm(dim)

    def forward(self, x: Float[Tensor, "B S D"], rotation: Rotation, cache: Cache | None) -> Float[Tensor, "B S D"]:
        """The next residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaAttention(nn.Module):
    """Causal attention with rotary positions over the whole head."""

    def __init__(self, dim: int, heads: int, index: int) -> None:
        super().__init__()
        self.heads, self.index = heads, index
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "B S D"], rotation: Rotation, cache: Cache | None) -> Float[Tensor, "B S D"]:
        """What each position takes from those before it and from itself."""
        q, k, v = (_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache:
            k, v = cache.extend(self.index, k, v)
        causal = q.shape[2] > 1
        assert k.shape[2] == q.shape[2] or not causal, "a cache is continued one position at a time"
        return self.o_proj(_joined(functional.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))`` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, ffn, bias=False), nn.Linear(dim, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """What is added to the residual stream."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """``x`` of mean square 1, scaled."""
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), RMS_EPS)


class FlowTransformer(nn.Module):
    """The DiT: every token of a block sees every other."""

    def __init__(self, dim: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FlowLayer(dim, heads, ffn) for _ in range(layers))
        self.rotated = max(dim // heads // 2, FLOW_ROTARY_LEAST)
        self.checkpointing = False

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Hidden states of the last layer; there is no norm after it."""
        rotation = rotary(0, x.shape[1], self.rotated, FLOW_ROTARY_BASE, x.device)
        return _run(self.layers, self.checkpointing and self.training, x, rotation)


class FlowLayer(nn.Module):
    """Attention and feed-forward, each after a layer norm."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.pre_norm, self.ff_norm = LayerNorm(dim), LayerNorm(dim)
        self.self_attn = FlowAttention(dim, heads)
        self.ff = FlowMLP(dim, ffn)

    def forward(self, x: Float[Tensor, "B S D"], rotation: Rotation) -> Float[Tensor, "B S D"]:
        """The next residual stream."""
        x = x + self.self_attn(self.pre_norm(x), rotation)
        return x + self.ff(self.ff_norm(x))


class FlowAttention(nn.Module):
    """Full attention; the first dimensions of each head are rotated."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B S D"], rotation: Rotation) -> Float[Tensor, "B S D"]:
        """What each position takes from all of them."""
        q, k, v = (_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
        return self.to_out(_joined(attended))


class FlowMLP(nn.Module):
    """SwiGLU under upstream's names: ``ff.0`` gates, ``ff.2`` leads back."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(Gate(dim, ffn), nn.Identity(), nn.Linear(ffn, dim, bias=False))

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """What is added to the residual stream."""
        return self.ff(x)


class Gate(nn.Module):
    """``up(x) · silu(gate(x))``."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(dim, ffn, bias=False), nn.Linear(dim, ffn, bias=False)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S F"]:
        """The hidden layer."""
        return self.up_proj(x) * functional.silu(self.gate_proj(x))


class LayerNorm(nn.Module):
    """Layer norm whose shift is a buffer: stored, never trained."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """``x`` of mean 0 and variance 1, scaled and shifted."""
        return functional.layer_norm(x, x.shape[-1:], self.gamma.to(x.dtype), self.beta.to(x.dtype), LAYER_NORM_EPS)


def rotary(start: int, count: int, rotated: int, base: float, device: torch.device) -> Rotation:
    """Rotary positions ``start`` … (https://arxiv.org/abs/2104.09864), ``rotated`` dimensions of a head turning."""
    frequencies = base ** (-torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated)
    angles = torch.arange(start, start + count, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B H S d"], rotation: Rotation) -> Float[Tensor, "B H S d"]:
    """Turn the first dimensions of each head, halves paired; the others stay."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _run(layers: Iterable[nn.Module], checkpointing: bool, x: Tensor, *others: Any) -> Tensor:
    for layer in layers:
        x = cast("Tensor", _recomputed(layer, x, *others) if checkpointing else layer(x, *others))
    return x


def _heads(x: Float[Tensor, "B S D"], heads: int) -> Float[Tensor, "B H S d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Float[Tensor, "B H S d"]) -> Float[Tensor, "B S D"]:
    return x.transpose(1, 2).flatten(2)

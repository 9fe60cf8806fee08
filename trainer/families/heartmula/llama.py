"""The Llama 3.2 stack (Dubey et al. 2024, https://arxiv.org/abs/2407.21783) as torchtune lays it out.

Legend: ``B`` batch, ``S`` sequence, ``P`` positions attended to, ``D`` width, ``H`` head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.codecs.heartcodec_network import rotate
from trainer.shapes import Bool, Complex, Float, Int


@dataclass(frozen=True)
class LlamaConfig:
    """One stack, under torchtune's names (``torchtune.models.llama3_2.llama3_2``)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_base: float = 500_000
    rope_scale_factor: float = 32
    rope_low_freq_factor: float = 1
    rope_high_freq_factor: float = 4
    rope_old_context_len: int = 8192


class Cache:
    """Keys and values of the positions that a stack has seen."""

    def __init__(self) -> None:
        self.length = 0
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``layer``'s keys and values [B, heads, P, H], those of the new positions at the end."""
        if layer in self._seen:
            keys, values = (torch.cat(both, 2) for both in zip(self._seen[layer], pair, strict=True))
            pair = keys, values
        self._seen[layer] = pair
        return pair


class Llama(nn.Module):
    """Causal layers and the final norm; embeddings and heads are the network's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = _Norm(config)
        self.checkpointing = False

    def forward(
        self,
        hidden: Float[Tensor, "B S D"],
        cache: Cache | None = None,
        positions: Int[Tensor, "B S"] | None = None,
        mask: Bool[Tensor, "B 1 S P"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states after the final norm.

        Args:
            hidden: embeddings.
            cache: of the positions before these; these are added to it. Without a ``mask``, these are one if there are
                any before.
            positions: where padding shifts them; by default they continue what ``cache`` holds.
            mask: who attends to whom; by default to everything before and itself.
        """
        seen = cache.length if cache else 0
        if positions is None:
            positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        rotation = rotations(positions, self.config)
        for layer in self.layers:
            if self.checkpointing and self.training:
                hidden = checkpoint(layer, hidden, rotation, use_reentrant=False)  # type: ignore[assignment]
            else:
                hidden = layer(hidden, rotation, mask, cache)
        if cache:
            cache.length += hidden.shape[1]
        return self.norm(hidden)


def rotations(positions: Int[Tensor, "B S"], config: LlamaConfig) -> Complex[Tensor, "B S 1 half"]:
    """Rotary embedding of interleaved pairs (https://arxiv.org/abs/2104.09864) with Llama 3.1's scaled frequencies.

    Wavelengths that fit ``rope_high_freq_factor`` times into the old context stay, those that fit less than
    ``rope_low_freq_factor`` times are stretched, those between are interpolated (torchtune,
    ``llama3_1/_position_embeddings.py``, v0.4.0).
    """
    size = config.embed_dim // config.num_heads
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    frequencies = 1.0 / config.rope_base**exponents
    fits = config.rope_old_context_len * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((fits - low) / (high - low)).clamp(0, 1)
    angles = positions[..., None, None] * (frequencies * (kept + (1 - kept) / config.rope_scale_factor))
    return torch.polar(torch.ones_like(angles), angles)


class _Norm(nn.Module):
    """Root mean square norm, computed in fp32, its weight under torchtune's name."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Parameter(torch.ones(config.embed_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.scale.shape, self.scale.to(hidden.dtype), self.eps)


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.sa_norm = _Norm(config)
        self.attn = _Attention(config)
        self.mlp_norm = _Norm(config)
        self.mlp = _FeedForward(config)

    def forward(
        self, hidden: Tensor, rotation: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        hidden = hidden + self.attn(self.sa_norm(hidden), rotation, mask, cache)
        return hidden + self.mlp(self.mlp_norm(hidden))


class _Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.size = config.embed_dim // config.num_heads
        shared = config.num_kv_heads * self.size
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.k_proj = nn.Linear(config.embed_dim, shared, bias=False)
        self.v_proj = nn.Linear(config.embed_dim, shared, bias=False)
        self.output_proj = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def forward(self, hidden: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        queries, keys, values = (
            projection(hidden).unflatten(-1, (-1, self.size)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys, values = (x.transpose(1, 2) for x in (rotate(queries, rotation), rotate(keys, rotation), values))
        if cache:
            keys, values = cache.extend(self, (keys, values))
        causal = mask is None and queries.shape[2] > 1
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.output_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): gate ``w1``, down ``w2``, up ``w3``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.embed_dim, config.intermediate_dim, bias=False)
        self.w2 = nn.Linear(config.intermediate_dim, config.embed_dim, bias=False)
        self.w3 = nn.Linear(config.embed_dim, config.intermediate_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))

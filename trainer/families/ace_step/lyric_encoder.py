"""The encoder of the lyrics: self-attention with relative positions, pre-norm.

A Conformer (Gulati et al. 2020, https://arxiv.org/abs/2005.08100) without its convolution and its first feed-forward;
relative positions as in Transformer-XL (Dai et al. 2019, https://arxiv.org/abs/1901.02860, appendix B). Names and
constants: ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``lyrics_utils/lyric_encoder.py``.

Legend: ``B`` batch, ``L`` lyric tokens, ``W`` width, ``H`` heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.shapes import Bool, Float

DROPOUT = 0.1


class LyricEncoder(nn.Module):
    """Embedded lyrics → their hidden states.

    Args:
        width: of input and output.
        layers: how many.
        heads: of the attention.
        ffn: hidden width of the feed-forward.
    """

    def __init__(self, width: int, layers: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"out": nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))})
        self.encoders = nn.ModuleList([_Layer(width, heads, ffn) for _ in range(layers)])
        self.after_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, lyrics: Float[Tensor, "B L W"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        """Hidden states; only those at ``mask`` mean something, and only they are attended to."""
        hidden = self.dropout(self.embed["out"](lyrics)) * math.sqrt(lyrics.shape[-1])
        positions = self.dropout(relative_positions(lyrics.shape[1], lyrics.shape[-1], lyrics.device).to(hidden.dtype))
        hidden = self.dropout(hidden)
        # A row without lyrics attends to all of its padding instead of to nothing; nobody looks at what comes of it.
        attended = mask | ~mask.any(1, keepdim=True)
        for layer in self.encoders:
            hidden = layer(hidden, positions, attended)
        return self.after_norm(hidden)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm_mha = nn.LayerNorm(width)
        self.self_attn = _RelativeAttention(width, heads)
        self.norm_ff = nn.LayerNorm(width)
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(width, ffn), "w_2": nn.Linear(ffn, width)})
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, hidden: Tensor, positions: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.self_attn(self.norm_mha(hidden), positions, attended))
        inner = self.dropout(functional.silu(self.feed_forward["w_1"](self.norm_ff(hidden))))
        return hidden + self.dropout(self.feed_forward["w_2"](inner))


class _RelativeAttention(nn.Module):
    """Scores ``(q + u)·k + (q + v)·p`` over √(W/H), with ``p`` the projected distance of query and key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width // heads)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width // heads)))

    def forward(self, hidden: Tensor, positions: Tensor, attended: Tensor) -> Tensor:
        query, key, value = (
            layer(hidden).unflatten(-1, (self.heads, -1)) for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        distances = self.linear_pos(positions).unflatten(-1, (self.heads, -1))
        by_distance = torch.einsum("blhd,phd->bhlp", query + self.pos_bias_v.to(query.dtype), distances)
        bias = _by_key(by_distance) / math.sqrt(query.shape[-1])
        found = functional.scaled_dot_product_attention(
            (query + self.pos_bias_u.to(query.dtype)).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=bias.masked_fill(~attended[:, None, None], -torch.inf).to(query.dtype),
            dropout_p=DROPOUT if self.training else 0.0,
        )
        return self.linear_out(found.transpose(1, 2).flatten(2))


def relative_positions(length: int, width: int, device: torch.device) -> Float[Tensor, "P W"]:
    """Sines and cosines, interleaved, of the distances ``length - 1 … -(length - 1)``; ``P = 2 · length - 1``."""
    distance = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = distance[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def _by_key(scores: Float[Tensor, "B H L P"]) -> Float[Tensor, "B H L L"]:
    """From scores by distance (query minus key, falling) to scores by key: row ``i`` is read from ``L - 1 - i`` on."""
    length = scores.shape[2]
    padded = functional.pad(scores, (1, 0)).flatten(2)
    return padded[..., length:].unflatten(-1, (length, -1))[..., :length]

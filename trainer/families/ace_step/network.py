"""ACE-Step's diffusion transformer: linear attention over the song, cross-attention to tags and lyrics.

Architecture, names and constants: ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934 (``models/``), after Sana
(Xie et al. 2024, https://arxiv.org/abs/2410.10629: ReLU linear attention, GLUMBConv) and PixArt-α (Chen et al. 2023,
https://arxiv.org/abs/2310.00426: one modulation for all blocks).

Legend: ``B`` batch, ``T`` latent frames, ``S`` context (speaker, tags, lyrics), ``D`` width, ``H`` heads, ``C`` latent
channels, ``F`` their bins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.shapes import Bool, Float, Int
from trainer.spec.errors import UtaforgeError

from .lyric_encoder import LyricEncoder

EPS = 1e-6
TIME_WIDTH = 256
PATCH_GROUPS = 32
PATCH_WIDTH = 256
"""Channels of the patch embedding, for each latent channel."""
UNUSED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Layers of every cross-attention that upstream stores and never uses."""
Rope = tuple[Float[Tensor, "*L W"], Float[Tensor, "*L W"]]
"""Cosines and sines by which positions are told apart."""


@dataclass(frozen=True)
class Config:
    """``config.json`` of the release, what is read of it, under upstream's names.

    The last three are fixed upstream; only ``random:tiny`` has others.
    """

    num_layers: int
    inner_dim: int
    num_attention_heads: int
    attention_head_dim: int
    mlp_ratio: float
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int]
    rope_theta: float
    speaker_embedding_dim: int
    text_embedding_dim: int
    ssl_encoder_depths: tuple[int, ...]
    ssl_names: tuple[str, ...]
    ssl_latent_dims: tuple[int, ...]
    lyric_encoder_vocab_size: int
    lyric_hidden_size: int
    lyric_layers: int = 6
    lyric_heads: int = 16
    lyric_ffn: int = 4096

    @classmethod
    def of(cls, told: Mapping[str, Any], whose: str) -> "Config":
        """From the release's ``told``; its other keys do not matter.

        Raises:
            UtaforgeError: keys are missing (upstream's defaults are not those of its release).
        """
        wanted = {field.name for field in fields(cls)}
        missing = sorted(wanted - told.keys() - {"lyric_layers", "lyric_heads", "lyric_ffn"})
        if missing:
            raise UtaforgeError(
                f"{whose} is not the configuration of an ACE-Step v1: it lacks {', '.join(missing)}",
                "name the folder ace_step_transformer of the release, or the one that holds it",
            )
        return cls(**{name: told[name] for name in wanted & told.keys()})


@dataclass(frozen=True)
class Conditions:
    """What a song is made from.

    Attributes:
        text_hidden: hidden states of the tags [B, L, text_width].
        text_mask: which of them are attended to [B, L].
        text_length: how many there are [B]; the positions of the lyrics go on from there (upstream: ``L``, so that
            lyrics stand further back for the padding before them).
        lyric_ids: tokens of the lyrics [B, M].
        lyric_mask: which of them are attended to [B, M].
        speaker: embedding of the singer [B, speaker_width]; zeros for none.
    """

    text_hidden: Float[Tensor, "B L text_width"]
    text_mask: Bool[Tensor, "B L"]
    text_length: Int[Tensor, " B"]
    lyric_ids: Int[Tensor, "B M"]
    lyric_mask: Bool[Tensor, "B M"]
    speaker: Float[Tensor, "B speaker_width"]


@dataclass(frozen=True)
class Context:
    """Conditions as the cross-attention sees them.

    Attributes:
        hidden: speaker, tags and lyrics one after the other.
        mask: what of it is attended to.
        positions: of each.
    """

    hidden: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"]
    positions: Int[Tensor, "B S"]


@dataclass(frozen=True)
class Frames:
    """Which latent frames of a padded batch count, and for what.

    Upstream knows only ``attended``; its norms and convolutions see the padding. With ``inside`` a song is computed as
    if it were alone.

    Attributes:
        attended: frames that attention sees.
        inside: frames that exist for the convolutions and the norm over time.
    """

    attended: Bool[Tensor, "B T"]
    inside: Bool[Tensor, "B T"]


class AceStepNetwork(nn.Module):
    """The transformer, under the names of upstream's ``ACEStepTransformer2DModel``.

    Latents, hidden states of the tags and tokens of the lyrics come from outside: shards hold them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        width, lyric = config.inner_dim, config.lyric_hidden_size
        self.transformer_blocks = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(TIME_WIDTH, width), "linear_2": nn.Linear(width, width)}
        )
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.speaker_embedder = nn.Linear(config.speaker_embedding_dim, width)
        self.genre_embedder = nn.Linear(config.text_embedding_dim, width)
        self.lyric_embs = nn.Embedding(config.lyric_encoder_vocab_size, lyric)
        self.lyric_encoder = LyricEncoder(lyric, config.lyric_layers, config.lyric_heads, config.lyric_ffn)
        self.lyric_proj = nn.Linear(lyric, width)
        self.projectors = nn.ModuleList([_projector(width, dim) for dim in config.ssl_latent_dims])
        self.proj_in = _PatchEmbedding(config)
        self.final_layer = _FinalLayer(config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(f".{unused}." in name for unused in UNUSED))
        self.speaker_embedder.weight.requires_grad_(False)  # upstream's release knows zeros for a speaker, no other

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.checkpointing = True

    def forward(
        self,
        latents: Float[Tensor, "B C F T"],
        timestep: Float[Tensor, " B"],
        conditions: Conditions,
        frames: Frames,
        *,
        project: bool = False,
    ) -> tuple[Float[Tensor, "B C F T"], list[Float[Tensor, "B T ssl_width"]]]:
        """Velocity ``noise - latents`` that is predicted, and with ``project`` the guesses at SSL features.

        Args:
            latents: noisy latents.
            timestep: 0 (clean) to 1000 (noise).
            conditions: of the songs.
            frames: which of them count.
            project: guess self-supervised features (``config.ssl_names``) from the hidden states.
        """
        return self.decode(latents, timestep, self.encode(conditions), frames, project=project)

    def encode(self, conditions: Conditions) -> Context:
        """The context of the cross-attention."""
        dtype = self.genre_embedder.weight.dtype
        lyrics = self.lyric_encoder(self.lyric_embs(conditions.lyric_ids), conditions.lyric_mask)
        parts = (
            self.speaker_embedder(conditions.speaker.to(dtype))[:, None],
            self.genre_embedder(conditions.text_hidden.to(dtype)),
            self.lyric_proj(lyrics),
        )
        batch, text = conditions.text_mask.shape
        mask = torch.cat([conditions.text_mask.new_ones(batch, 1), conditions.text_mask, conditions.lyric_mask], 1)
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        skipped = (text - conditions.text_length)[:, None] * (index > text)
        return Context(torch.cat(parts, 1), mask, index - skipped)

    def decode(
        self,
        latents: Float[Tensor, "B C F T"],
        timestep: Float[Tensor, " B"],
        context: Context,
        frames: Frames,
        *,
        project: bool = False,
    ) -> tuple[Float[Tensor, "B C F T"], list[Float[Tensor, "B T ssl_width"]]]:
        """``forward`` with the context in hand."""
        hidden = self.proj_in(latents, frames.inside)
        embedder = self.timestep_embedder
        time = time_features(timestep).to(hidden.dtype)
        time = embedder["linear_2"](functional.silu(embedder["linear_1"](time)))
        modulation = self.t_block(time)
        config = self.config
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        ropes = [
            rotary(where, config.attention_head_dim, config.rope_theta)
            for where in (positions, context.positions[:, None])
        ]
        tapped: list[Any] = []
        for index, block in enumerate(self.transformer_blocks):
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, modulation, context, frames, ropes, use_reentrant=False)
            else:
                hidden = block(hidden, modulation, context, frames, ropes)
            tapped += [hidden] * config.ssl_encoder_depths.count(index)
        guesses = [layer(tap) for layer, tap in zip(self.projectors, tapped, strict=True)] if project else []
        return self.final_layer(hidden, time).float(), guesses


def time_features(timestep: Float[Tensor, " B"]) -> Float[Tensor, "B 256"]:
    """Cosines, then sines, of ``timestep`` at rates from 1 down to 1/10,000."""
    half = TIME_WIDTH // 2
    rates = torch.exp(torch.arange(half, device=timestep.device) * (-math.log(10_000) / half))
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def rotary(positions: Int[Tensor, "*L"], width: int, theta: float) -> Rope:
    """Cosines and sines of positions; the ``width / 2`` rates are there twice, one half after the other."""
    rates = theta ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[..., None] * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(states: Float[Tensor, "B H L W"], rope: Rope) -> Float[Tensor, "B H L W"]:
    """``states``, turned in neighbouring pairs.

    The two of a pair have different rates, as ``rotary`` is made for pairs half a width apart: so upstream trained.
    """
    cos, sin = rope
    wide = states.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (wide * cos + turned * sin).to(states.dtype)


class _Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.inner_dim
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = _LinearAttention(config)
        self.cross_attn = _CrossAttention(config)
        self.ff = _GatedConvolution(width, int(width * config.mlp_ratio))

    def forward(
        self, hidden: Tensor, modulation: Tensor, context: Context, frames: Frames, ropes: Sequence[Rope]
    ) -> Tensor:
        table = self.scale_shift_table + modulation.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.unsqueeze(2).unbind(1)
        hidden = hidden + gate * self.attn(_normed(hidden) * (1 + scale) + shift, frames.attended, ropes[0])
        hidden = hidden + self.cross_attn(hidden, context, frames.attended, ropes)
        return hidden + gate_ff * self.ff(_normed(hidden) * (1 + scale_ff) + shift_ff, frames.inside)


class _LinearAttention(nn.Module):
    """``relu(q)·Σ relu(k)vᵀ / relu(q)·Σ relu(k)``, in fp32: its cost grows with the length, not with its square."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = self.heads * config.attention_head_dim
        self.to_q = nn.Linear(config.inner_dim, inner)
        self.to_k = nn.Linear(config.inner_dim, inner)
        self.to_v = nn.Linear(config.inner_dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, config.inner_dim)])

    def forward(self, hidden: Tensor, attended: Tensor, rope: Rope) -> Tensor:
        query, key, value = (_heads(layer(hidden), self.heads).float() for layer in (self.to_q, self.to_k, self.to_v))
        seen = attended[:, None, :, None]
        query, key = rotate(query, rope).relu(), rotate(key, rope).relu() * seen
        with torch.autocast(hidden.device.type, enabled=False):
            weighted = query @ (key.transpose(2, 3) @ value)
            total = query @ key.sum(2).unsqueeze(3)
        found = weighted / (total + 1e-15) * seen
        return self.to_out[0](found.transpose(1, 2).flatten(2).to(hidden.dtype))


class _CrossAttention(nn.Module):
    """Frames attend to the context; both are turned by their own positions. Frames not ``attended`` find nothing."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.inner_dim
        inner = self.heads * config.attention_head_dim
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])
        for name in UNUSED[:3]:
            self.add_module(name, nn.Linear(width, inner))
        self.to_add_out = nn.Linear(inner, width)

    def forward(self, hidden: Tensor, context: Context, attended: Tensor, ropes: Sequence[Rope]) -> Tensor:
        query = rotate(_heads(self.to_q(hidden), self.heads), ropes[0])
        key = rotate(_heads(self.to_k(context.hidden), self.heads), ropes[1])
        value = _heads(self.to_v(context.hidden), self.heads)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=context.mask[:, None, None])
        return self.to_out[0]((found * attended[:, None, :, None]).transpose(1, 2).flatten(2))


class _GatedConvolution(nn.Module):
    """Widen, SiLU, convolve over three frames, gate, narrow."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inverted_conv = nn.ModuleDict({"conv": _Pointwise(width, 2 * inner, 1)})
        self.depth_conv = nn.ModuleDict({"conv": nn.Conv1d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)})
        self.point_conv = nn.ModuleDict({"conv": _Pointwise(inner, width, 1, bias=False)})

    def forward(self, hidden: Tensor, inside: Tensor) -> Tensor:
        wide = functional.silu(self.inverted_conv["conv"](hidden)) * inside[..., None]
        wide, gate = self.depth_conv["conv"](wide.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        return self.point_conv["conv"](wide * functional.silu(gate))


class _Pointwise(nn.Conv1d):
    """A convolution over one frame, as the matrix product that it is: [B, T, D] → [B, T, D]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight.squeeze(2), self.bias)


class _PatchEmbedding(nn.Module):
    """All bins of a latent frame → one hidden state."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        middle, patch = config.in_channels * PATCH_WIDTH, config.patch_size
        widen, narrow = nn.Conv2d(config.in_channels, middle, patch, patch), nn.Conv2d(middle, config.inner_dim, 1)
        self.early_conv_layers = nn.ModuleList([widen, _MaskedGroupNorm(PATCH_GROUPS, middle, eps=EPS), narrow])

    def forward(self, latents: Tensor, inside: Tensor) -> Tensor:
        widen, norm, narrow = self.early_conv_layers
        wide = widen(latents.to(next(widen.parameters()).dtype))
        return narrow(norm(wide, inside)).squeeze(2).transpose(1, 2)


class _MaskedGroupNorm(nn.GroupNorm):
    """Group norm whose moments are taken over the frames inside the song."""

    def forward(self, states: Float[Tensor, "B C 1 T"], inside: Bool[Tensor, "B T"]) -> Float[Tensor, "B C 1 T"]:
        groups = states.float().unflatten(1, (self.num_groups, -1))
        weight = inside[:, None, None, None]
        count = weight.sum((2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * weight).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * weight).sum((2, 3, 4), keepdim=True) / count
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(states.dtype)


class _FinalLayer(nn.Module):
    """Hidden states → latents."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch = (*config.patch_size, config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.inner_dim) / config.inner_dim**0.5)
        self.linear = nn.Linear(config.inner_dim, math.prod(self.patch))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None]).unsqueeze(2).unbind(1)
        patches = self.linear(_normed(hidden) * (1 + scale) + shift)
        return patches.unflatten(-1, self.patch).permute(0, 4, 2, 1, 3).flatten(3)


def _projector(width: int, features: int) -> nn.Sequential:
    wide = 2 * width
    layers = (nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, features))
    return nn.Sequential(*layers)


def _normed(hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:], eps=EPS)


def _heads(states: Float[Tensor, "B L D"], heads: int) -> Float[Tensor, "B H L W"]:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)

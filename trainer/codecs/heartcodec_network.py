"""HeartCodec's decoder: codes → (flow matching) → latents → (convolutions) → waveform.

Written from the shapes and formulas of HeartMuLa/heartlib@3981c52, ``src/heartlib/heartcodec/models/``; its names are
kept. Its waveform encoder makes latents, not codes, and is not needed here.

Legend: ``B`` batch, ``K`` codebooks, ``T`` code frames (12.5 a second), ``L`` latents (25 a second), ``D`` width,
``C`` channels, ``N`` samples.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from trainer.shapes import Complex, Float, Int

GRID = 9
"""Latents are rounded to multiples of 1/9 (``sq_codec.py``)."""
DILATIONS = (1, 3, 5, 7, 9)
TIME_WIDTH, TIME_SCALE, TIME_PERIOD = 512, 1000.0, 10_000.0
ROPE_BASE = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class HeartCodecConfig:
    """What the decoder needs of upstream's ``config.json``; the defaults are the release's."""

    dim: int = 512
    codebook_size: int = 8192
    codebook_dim: int = 32
    num_quantizers: int = 8
    attention_head_dim: int = 64
    in_channels: int = 1024
    num_attention_heads: int = 24
    num_layers: int = 24
    num_layers_2: int = 6
    out_channels: int = 256
    num_bands: int = 1
    sample_rate: int = 48_000
    num_samples: int = 2
    upsample_factors: tuple[int, ...] = (5, 4, 4, 4, 3)
    upsample_kernel_sizes: tuple[int, ...] = (10, 8, 8, 8, 6)
    latent_hidden_dim: int = 128
    default_kernel_size: int = 7
    delay_kernel_size: int = 5
    init_channel: int = 64
    res_kernel_size: int = 7


class HeartCodecNetwork(nn.Module):
    """Both decoders, under upstream's names."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.flow_matching = FlowMatching(config)
        self.scalar_model = nn.ModuleDict({"decoder": WaveformDecoder(config)})

    def waveform(self, latents: Float[Tensor, "L D"]) -> Float[Tensor, "2 N"]:
        """Stereo: the first half of each latent is the left channel's, the second the right's."""
        return self.scalar_model["decoder"](latents.unflatten(1, (2, -1)).permute(1, 2, 0))[:, 0]


class FlowMatching(nn.Module):
    """Latents of codes (Lipman et al. 2023, https://arxiv.org/abs/2210.02747)."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        self.vq_embed = _ResidualCodes(config)
        self.cond_feature_emb = nn.Linear(config.dim, config.dim)
        # Upstream puts it where a window has latents without codes, which decoding never has.
        self.zero_cond_embedding1 = nn.Parameter(torch.randn(config.dim))
        self.estimator = _Estimator(config)

    def condition(self, codes: Int[Tensor, "B K T"]) -> Float[Tensor, "B T D"]:
        """What the flow is conditioned on, a vector a code frame."""
        return self.cond_feature_emb(self.vq_embed(codes))

    def forward(
        self,
        codes: Int[Tensor, "1 K T"],
        noise: Float[Tensor, "1 L D"],
        before: Float[Tensor, "1 O D"],
        steps: int,
        guidance: float,
    ) -> Float[Tensor, "1 L D"]:
        """Latents of one window, two a code frame, by Euler steps (``solve_euler`` in ``flow_matching.py``).

        Args:
            codes: of the window.
            noise: where the flow begins.
            before: latents of the window's beginning that are known already, from none on.
            steps: of equal length, from time 0 to 1.
            guidance: velocity is ``unconditional + guidance · (conditional - unconditional)``; 1 is off.
        """
        condition = self.condition(codes).repeat_interleave(2, 1)
        known = before.shape[1]
        context = functional.pad(before, (0, 0, 0, noise.shape[1] - known))
        conditions = condition if guidance <= 1 else torch.cat([torch.zeros_like(condition), condition])
        latents, times = noise, torch.linspace(0, 1, steps + 1, device=noise.device)
        for now, then in pairwise(times):
            start = (1 - (1 - 1e-6) * now) * noise[:, :known] + now * before
            latents = torch.cat([start, latents[:, known:]], 1)
            inputs = torch.cat([latents, context], 2).expand(len(conditions), -1, -1)
            velocity = self.estimator(torch.cat([inputs, conditions], 2), now.expand(len(conditions)))
            if guidance > 1:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            latents = latents + (then - now) * velocity
        return torch.cat([before, latents[:, known:]], 1)


class _ResidualCodes(nn.Module):
    """Residual codebooks (``vector_quantize_pytorch.ResidualVQ``): the sum of the entries, projected."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        self.project_in = nn.Linear(config.dim, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, config.dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"_codebook": _Codebook(config)}) for _ in range(config.num_quantizers)
        )

    @property
    def books(self) -> Float[Tensor, "K V D"]:
        """All entries."""
        return torch.cat([self.get_buffer(f"layers.{book}._codebook.embed") for book in range(len(self.layers))])

    def forward(self, codes: Int[Tensor, "B K T"]) -> Float[Tensor, "B T D"]:
        entries = (book[ids] for book, ids in zip(self.books, codes.unbind(1), strict=True))
        return self.project_out(torch.stack(list(entries)).sum(0))


class _Codebook(nn.Module):
    """Entries, and the running means that training keeps beside them."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        shape = (1, config.codebook_size, config.codebook_dim)
        self.register_buffer("initted", torch.ones(()))
        self.register_buffer("cluster_size", torch.zeros(shape[:2]))
        self.register_buffer("embed_avg", torch.zeros(shape))
        self.register_buffer("embed", torch.randn(shape))


class _Estimator(nn.Module):
    """The flow's velocity: Llama blocks, then wider ones, under PixArt-α's norms (https://arxiv.org/abs/2310.00426)."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        self.heads = heads = config.num_attention_heads
        size = config.attention_head_dim
        width = heads * size
        self.proj_in = _Projection(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(_Block(heads, size) for _ in range(config.num_layers))
        self.transformer_blocks_2 = nn.ModuleList(_Block(heads, 2 * size) for _ in range(config.num_layers_2))
        self.connection_proj = _Projection(config.in_channels + width, 2 * width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.scale_shift_table_2 = nn.Parameter(torch.randn(2, 2 * width) / (2 * width) ** 0.5)
        self.proj_out = _Projection(2 * width, config.out_channels)
        self.adaln_single = _Modulation(width)
        self.adaln_single_2 = _Modulation(2 * width)

    def forward(self, inputs: Float[Tensor, "B L C"], time: Float[Tensor, " B"]) -> Float[Tensor, "B L D"]:
        """Velocity at ``time`` in [0, 1], of latents, known latents and conditions side by side."""
        hidden = self._stage(
            self.proj_in(inputs), time, self.transformer_blocks, self.adaln_single, self.scale_shift_table
        )
        hidden = self.connection_proj(torch.cat([inputs, hidden], 2))
        hidden = self._stage(hidden, time, self.transformer_blocks_2, self.adaln_single_2, self.scale_shift_table_2)
        return self.proj_out(hidden)

    def _stage(
        self, hidden: Tensor, time: Tensor, blocks: nn.ModuleList, modulation: "_Modulation", table: Tensor
    ) -> Tensor:
        modulations, embedded = modulation(time)
        rotation = _rotations(hidden.shape[1], hidden.shape[2] // self.heads, hidden.device)
        for block in blocks:
            hidden = block(hidden, modulations, rotation)
        shift, scale = (table + embedded[:, None]).chunk(2, 1)
        return functional.layer_norm(hidden, hidden.shape[2:], eps=NORM_EPS) * (1 + scale) + shift


class _Modulation(nn.Module):
    """Time → its embedding, and six modulations of a block: shift, scale and gate of attention and of feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = {"linear_1": nn.Linear(TIME_WIDTH, width), "linear_2": nn.Linear(width, width)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, time: Float[Tensor, " B"]) -> tuple[Float[Tensor, "B 6 D"], Float[Tensor, "B D"]]:
        half = TIME_WIDTH // 2
        frequencies = torch.exp(-math.log(TIME_PERIOD) * torch.arange(half, device=time.device) / half)
        angles = time[:, None] * frequencies * TIME_SCALE
        first, second = (self.emb.get_submodule(f"timestep_embedder.linear_{layer}") for layer in (1, 2))
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        embedded = second(functional.silu(first(waves)))
        return self.linear(functional.silu(embedded)).unflatten(1, (6, -1)), embedded


class _Block(nn.Module):
    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        width = heads * size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn_norm = nn.RMSNorm(width, NORM_EPS)
        self.attn = _Attention(heads, width)
        self.mlp_norm = nn.RMSNorm(width, NORM_EPS)
        self.mlp = _FeedForward(width)

    def forward(self, hidden: Tensor, modulations: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.scale_shift_table + modulations).chunk(6, 1)
        hidden = hidden + gate * self.attn(self.attn_norm(hidden) * (1 + scale) + shift, rotation)
        return hidden + gate_2 * self.mlp(self.mlp_norm(hidden) * (1 + scale_2) + shift_2)


class _Attention(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        queries, keys, values = (
            projection(hidden).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(
            rotate(queries, rotation).transpose(1, 2), rotate(keys, rotation).transpose(1, 2), values.transpose(1, 2)
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """SwiGLU, two thirds of four times the width, rounded up to a multiple of 256 (``transformer.py``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-int(2 * 4 * width / 3) // 256) * 256
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class _Projection(nn.Module):
    """A convolution over three latents, scaled by 1/√3, and a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ffn_1 = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.ffn_2 = nn.Linear(outputs, outputs)

    def forward(self, hidden: Float[Tensor, "B L C"]) -> Float[Tensor, "B L D"]:
        return self.ffn_2(self.ffn_1(hidden.transpose(1, 2)).transpose(1, 2) * 3**-0.5)


def rotate(vectors: Float[Tensor, "B S H D"], rotation: Complex[Tensor, "#B S 1 half"]) -> Float[Tensor, "B S H D"]:
    """Rotary embedding of interleaved pairs (https://arxiv.org/abs/2104.09864), computed in fp32."""
    pairs = torch.view_as_complex(vectors.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(vectors.dtype)


def _rotations(length: int, size: int, device: torch.device) -> Complex[Tensor, "1 L 1 half"]:
    frequencies = 1.0 / ROPE_BASE ** (torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.arange(length, device=device)[None, :, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


class WaveformDecoder(nn.ModuleList):
    """Latents of one channel → its waveform, by causal convolutions (``sq_codec.py``, ``ScalarModel.decode``)."""

    def __init__(self, config: HeartCodecConfig) -> None:
        widths = [config.init_channel * 2**i for i in reversed(range(len(config.upsample_factors) + 1))]
        ahead = config.delay_kernel_size
        super().__init__(
            [
                weight_norm(nn.Conv1d(config.latent_hidden_dim, widths[0], ahead, padding=(ahead - 1) // 2)),
                *(
                    _Upsample(inputs, outputs, kernel, factor, config.res_kernel_size)
                    for inputs, outputs, kernel, factor in zip(
                        widths, widths[1:], config.upsample_kernel_sizes, config.upsample_factors, strict=False
                    )
                ),
                *([_Repeat(config)] if config.num_samples > 1 else []),
                weight_norm(_CausalConv(config.init_channel, config.num_bands, config.default_kernel_size)),
            ]
        )

    def forward(self, latents: Float[Tensor, "B D L"]) -> Float[Tensor, "B 1 N"]:
        """Waveforms of latents, which are first rounded to the grid that the decoder was trained on."""
        hidden = torch.round(GRID * latents) / GRID
        for layer in self:
            hidden = layer(hidden)
        return hidden


class _CausalConv(nn.Conv1d):
    """Sees what came before: padded on the left alone."""

    def forward(self, input: Float[Tensor, "B C N"]) -> Float[Tensor, "B D N"]:
        return super().forward(functional.pad(input, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class _Upsample(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, factor: int, residual_kernel: int) -> None:
        super().__init__()
        self.factor = factor
        self.up_conv = nn.ModuleDict({"layer": weight_norm(nn.ConvTranspose1d(inputs, outputs, kernel, factor))})
        self.convs = nn.ModuleList(_Residual(outputs, residual_kernel, dilation) for dilation in DILATIONS)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.up_conv["layer"](hidden)[..., : -self.factor]
        for unit in self.convs:
            hidden = unit(hidden)
        return hidden


class _Residual(nn.Module):
    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = weight_norm(_CausalConv(channels, channels, kernel, dilation=dilation))
        self.conv2 = weight_norm(_CausalConv(channels, channels, 1))
        self.activation1 = nn.PReLU()
        self.activation2 = nn.PReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.activation2(self.conv2(self.activation1(self.conv1(hidden))))


class _Repeat(nn.Module):
    """Each value several times, then smoothed."""

    def __init__(self, config: HeartCodecConfig) -> None:
        super().__init__()
        self.times = config.num_samples
        self.conv = _CausalConv(config.init_channel, config.init_channel, config.default_kernel_size)
        self.activation = nn.PReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.conv(hidden.repeat_interleave(self.times, -1)))

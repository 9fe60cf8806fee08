"""ADaMoSHiFiGAN, ACE-Step's vocoder: log-mel spectrograms ⇄ waveforms at 44.1 kHz.

The log-mel front end; a ConvNeXt (Liu et al. 2022, https://arxiv.org/abs/2201.03545) that reads the spectrogram; a
HiFi-GAN generator (Kong et al. 2020, https://arxiv.org/abs/2010.05646) with SiLU that writes the waveform. Names and
constants: ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``music_dcae/music_vocoder.py`` and
``music_log_mel.py``.

Legend: ``B`` batch, ``N`` samples, ``M`` mel bins, ``T`` frames, ``C`` channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import melscale_fbanks

from trainer.shapes import Float
from trainer.spec.errors import UtaforgeError

EPS = 1e-6
QUIETEST = 1e-5
"""Smallest mel value; what is below is silence."""


@dataclass(frozen=True)
class VocoderConfig:
    """``config.json`` of the release's ``music_vocoder``, under upstream's names; the defaults are the release's."""

    input_channels: int = 128
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (128, 256, 384, 512)
    kernel_sizes: tuple[int, ...] = (7,)
    upsample_rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (8, 8, 4, 4, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11, 13)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5), (1, 3, 5))
    num_mels: int = 512
    upsample_initial_channel: int = 1024
    pre_conv_kernel_size: int = 13
    post_conv_kernel_size: int = 13
    sampling_rate: int = 44_100
    n_fft: int = 2048
    win_length: int = 2048
    hop_length: int = 512
    f_min: float = 40
    f_max: float = 16_000
    n_mels: int = 128

    @classmethod
    def of(cls, told: Mapping[str, Any], whose: str) -> "VocoderConfig":
        """From the release's ``told``.

        Raises:
            UtaforgeError: it asks for something that no release has.
        """
        if told.get("use_template") or len(told.get("kernel_sizes", (7,))) != 1:
            raise UtaforgeError(
                f"{whose} is not ACE-Step's vocoder: it has a template or several kernel sizes",
                "name the folder music_vocoder of the ACE-Step v1 release",
            )
        return cls(**{field.name: told[field.name] for field in fields(cls) if field.name in told})


class Vocoder(nn.Module):
    """Log-mel spectrograms → waveforms, under upstream's names."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.mel_transform = LogMel(config)
        self.backbone = _ConvNeXt(config)
        self.head = _HiFiGan(config)

    def forward(self, log_mel: Float[Tensor, "B M T"]) -> Float[Tensor, "B N"]:
        """Waveforms of ``hop_length · T`` samples."""
        return self.head(self.backbone(log_mel)).squeeze(1).tanh()


class LogMel(nn.Module):
    """Waveforms → natural logarithms of their mel spectrograms (Slaney's scale and norm, magnitudes)."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.spectrogram = nn.Module()
        self.spectrogram.register_buffer("window", torch.hann_window(config.win_length))
        self.mel_scale = nn.Module()
        self.mel_scale.register_buffer(
            "fb",
            melscale_fbanks(
                config.n_fft // 2 + 1,
                float(config.f_min),
                float(config.f_max),
                config.n_mels,
                config.sampling_rate,
                norm="slaney",
                mel_scale="slaney",
            ),
        )

    def forward(self, samples: Float[Tensor, "B N"]) -> Float[Tensor, "B M T"]:
        """``T = N / hop_length`` frames; both ends are reflected."""
        config = self.config
        around = config.win_length - config.hop_length
        padded = functional.pad(samples[:, None], (around // 2, (around + 1) // 2), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            padded,
            config.n_fft,
            config.hop_length,
            config.win_length,
            window=self.spectrogram.get_buffer("window"),
            center=False,
            return_complex=True,
        )
        magnitude = torch.view_as_real(spectrum).square().sum(-1).add(EPS).sqrt()
        return (self.mel_scale.get_buffer("fb").T @ magnitude).clamp(min=QUIETEST).log()


class _ConvNeXt(nn.Module):
    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        kernel, dims = config.kernel_sizes[0], config.dims
        first = nn.Conv1d(config.input_channels, dims[0], kernel, padding=kernel // 2, padding_mode="replicate")
        self.channel_layers = nn.ModuleList([nn.Sequential(first, _ChannelNorm(dims[0]))])
        for before, after in pairwise(dims):
            self.channel_layers.append(nn.Sequential(_ChannelNorm(before), nn.Conv1d(before, after, 1)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(_ConvNeXtBlock(dim, kernel) for _ in range(depth)))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = _ChannelNorm(dims[-1])

    def forward(self, states: Tensor) -> Tensor:
        for layer, stage in zip(self.channel_layers, self.stages, strict=True):
            states = stage(layer(states))
        return self.norm(states)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), EPS))

    def forward(self, states: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(states).transpose(1, 2))
        inner = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inner)))
        return states + inner.transpose(1, 2)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, T]."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states.transpose(1, 2)).transpose(1, 2)


class _HiFiGan(nn.Module):
    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        width = config.upsample_initial_channel
        self.conv_pre = _Conv(config.num_mels, width, config.pre_conv_kernel_size)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(_Upsampling(width, width // 2, kernel, rate))
            width //= 2
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                self.resblocks.append(_ResBlock(width, size, dilations))
        self.parallel = len(config.resblock_kernel_sizes)
        self.conv_post = _Conv(width, 1, config.post_conv_kernel_size)

    def forward(self, states: Tensor) -> Tensor:
        states = self.conv_pre(states)
        for index, up in enumerate(self.ups):
            states = up(functional.silu(states))
            blocks = self.resblocks[index * self.parallel : (index + 1) * self.parallel]
            total = blocks[0](states)
            for block in blocks[1:]:
                total = total + block(states)
            states = total / self.parallel
        return self.conv_post(functional.silu(states))


class _ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_Conv(channels, channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_Conv(channels, channels, kernel) for _ in dilations)

    def forward(self, states: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            states = states + second(functional.silu(first(functional.silu(states))))
        return states


class _Normed(nn.Module):
    """A weight kept as direction ``weight_v`` and, for each entry of the first axis, length ``weight_g``.

    Weight norm (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).
    """

    def __init__(self, shape: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        direction = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        self.weight_v = nn.Parameter(direction)
        self.weight_g = nn.Parameter(direction.norm(dim=(1, 2), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(channels))

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))


class _Conv(_Normed):
    """Convolution that keeps the length."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__((outputs, inputs, kernel), outputs)
        self.dilation, self.padding = dilation, dilation * (kernel - 1) // 2

    def forward(self, states: Tensor) -> Tensor:
        return functional.conv1d(states, self.weight, self.bias, padding=self.padding, dilation=self.dilation)


class _Upsampling(_Normed):
    """Transposed convolution that makes the length ``rate`` times as long."""

    def __init__(self, inputs: int, outputs: int, kernel: int, rate: int) -> None:
        super().__init__((inputs, outputs, kernel), outputs)
        self.rate, self.padding = rate, (kernel - rate) // 2

    def forward(self, states: Tensor) -> Tensor:
        return functional.conv_transpose1d(states, self.weight, self.bias, stride=self.rate, padding=self.padding)

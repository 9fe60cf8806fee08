"""FireflyGAN with a finite scalar quantiser, for fish-speech: 44.1 kHz mono ⇄ 21.5 frames a second of eight codes.

Log-mel spectrogram → ConvNeXt (Liu et al. 2022, https://arxiv.org/abs/2201.03545) → a quarter of the frames → FSQ
(Mentzer et al. 2023, https://arxiv.org/abs/2309.15505) in groups of channels; back through a HiFi-GAN (Kong et al.
2020, https://arxiv.org/abs/2010.05646). All convolutions are causal.

Legend: ``B`` batch, ``C`` channels, ``M`` mel bands, ``F`` spectra, ``K`` groups, ``T`` frames of codes, ``N`` samples.

Upstream: fishaudio/fish-speech@58046ea (v1.5.1): models/vqgan/modules, utils/spectrogram.py and
configs/firefly_gan_vq.yaml in fish_speech/; vector-quantize-pytorch 1.14.24.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.functional import melscale_fbanks

from trainer.shapes import Bool, Float, Int
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec
from trainer.weights import load, local_path, random_weights, tensors

from .base import hash_of_weights

WINDOW, CONTEXT = 1024, 64
"""Frames decoded at a time, which bounds the memory, and frames before them that are decoded too: more than the
decoder looks back (15), so that there are no seams."""

GENERATOR = "generator."
"""Before every key, in a training checkpoint."""


@dataclass(frozen=True)
class FireflyConfig:
    """The shape of the codec; the values are the release's.

    Attributes:
        sample_rate: in Hz.
        mels: bands of the spectrogram.
        window: samples of a spectrum.
        hop: samples between spectra; the product of ``rates``.
        depths: ConvNeXt blocks of each stage.
        widths: channels of each stage.
        kernel: of the ConvNeXt blocks.
        rates: upsampling steps of the decoder.
        rate_kernels: their kernels.
        kernels: of the decoder's parallel residual blocks.
        dilations: of each of them.
        channels: where the decoder begins; each step halves them.
        ends: kernels of the decoder's first and last convolution.
        groups: of channels, a code each.
        levels: of each digit of a code.
        factors: by which frames become fewer before they are quantised.
    """

    sample_rate: int = 44_100
    mels: int = 160
    window: int = 2048
    hop: int = 512
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (128, 256, 384, 512)
    kernel: int = 7
    rates: tuple[int, ...] = (8, 8, 2, 2, 2)
    rate_kernels: tuple[int, ...] = (16, 16, 4, 4, 4)
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    channels: int = 512
    ends: tuple[int, int] = (13, 13)
    groups: int = 8
    levels: tuple[int, ...] = (8, 5, 5, 5)
    factors: tuple[int, ...] = (2, 2)

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "FireflyConfig":
        """From the sections of upstream's ``firefly_gan_vq.yaml``."""
        spectrum, backbone, head, quantizer = (
            told[name] for name in ("spec_transform", "backbone", "head", "quantizer")
        )
        assert spectrum["win_length"] == spectrum["n_fft"] and quantizer["n_codebooks"] == 1
        return cls(
            sample_rate=spectrum["sample_rate"],
            mels=spectrum["n_mels"],
            window=spectrum["win_length"],
            hop=spectrum["hop_length"],
            depths=tuple(backbone["depths"]),
            widths=tuple(backbone["dims"]),
            kernel=backbone["kernel_size"],
            rates=tuple(head["upsample_rates"]),
            rate_kernels=tuple(head["upsample_kernel_sizes"]),
            kernels=tuple(head["resblock_kernel_sizes"]),
            dilations=tuple(map(tuple, head["resblock_dilation_sizes"])),
            channels=head["upsample_initial_channel"],
            ends=(head["pre_conv_kernel_size"], head["post_conv_kernel_size"]),
            groups=quantizer["n_groups"],
            levels=tuple(quantizer["levels"]),
            factors=tuple(quantizer["downsample_factor"]),
        )

    @property
    def factor(self) -> int:
        """Spectra of one frame of codes."""
        return math.prod(self.factors)


TINY = FireflyConfig(
    depths=(1, 1, 1, 1), widths=(8, 8, 8, 16), channels=32, kernels=(3,), dilations=((1, 3, 5),), ends=(3, 3)
)
"""Of ``random:tiny``: the release's rates and codes, few channels."""


class FireflyCodec:
    """Mono ⇄ 21.5 frames a second of eight codes.

    Args:
        config: its shape.
        url: of the weights; None for random ones.
    """

    name = "firefly"
    channels = 1
    timed = ("codes",)

    def __init__(self, config: FireflyConfig, url: str | None) -> None:
        self._config, self._url = config, url
        self.hop = config.hop * config.factor
        self.sample_rate = config.sample_rate
        self.frame_rate = config.sample_rate / self.hop
        self.codebooks = config.groups
        self.vocabulary = math.prod(config.levels)

    @classmethod
    def open(cls, model: BaseModelSpec) -> "FireflyCodec":
        """The codec in ``model.codec.weights["firefly"]``; with ``random:tiny`` and no weights, a tiny random one.

        Raises:
            UtaforgeError: the job names no weights.
        """
        url = model.codec.weights.get("firefly")
        if url is None and model.pretrained == "random:tiny":
            return cls(TINY, None)
        if url is None:
            raise UtaforgeError(
                "model.codec.weights.firefly is not given",
                "name there the file firefly-gan-vq-fsq-8x1024-21hz-generator.pth of a fish-speech 1.4 or 1.5 release",
            )
        return cls(FireflyConfig(), url)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the codes: everything but the decoder's head."""
        state = self._state(_decides_codes) if self._url else self.network.state_dict().items()
        return hash_of_weights({name: value for name, value in state if _decides_codes(name)})

    @cached_property
    def network(self) -> "Firefly":
        """The network, on the CPU in fp32.

        Raises:
            UtaforgeError: the weights are not there, or not those of FireflyGAN.
        """
        if self._url is None:
            return random_weights(lambda: Firefly(self._config)).eval()
        return load(lambda: Firefly(self._config), self._state(), self._url).eval()

    @torch.inference_mode()
    def encode(self, audio: Float[np.ndarray, "1 N"]) -> dict[str, np.ndarray]:
        """``codes`` [8, T] uint16 of ``audio``, ``T = N // 2048``: what is left of a frame at the end has no code."""
        frames = audio.shape[1] // self.hop
        if frames == 0:
            return {"codes": np.zeros((self.codebooks, 0), np.uint16)}
        codes, _ = self.network.encode(torch.from_numpy(audio), torch.tensor([audio.shape[1]]))
        return {"codes": codes[0, :, :frames].numpy().astype(np.uint16)}

    @torch.inference_mode()
    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 N"]:
        """Audio of ``codes`` [8, T]: ``N = 2048 · T``.

        Raises:
            DataError: a code is not in 0..999, or there are not eight rows.
        """
        codes = arrays["codes"].astype(np.int64)
        if len(codes) != self.codebooks or (codes.size and not (codes.min() >= 0 and codes.max() < self.vocabulary)):
            raise DataError(
                f"codes of shape {codes.shape} are not FireflyGAN's: it has {self.codebooks} rows of 0 to "
                f"{self.vocabulary - 1}",
                "decode them with the codec that made them",
            )
        parts = [np.zeros(0, np.float32)]
        for start in range(0, codes.shape[1], WINDOW):
            first = max(start - CONTEXT, 0)
            some = torch.from_numpy(codes[None, :, first : start + WINDOW])
            sound, _ = self.network.decode(some, torch.tensor([some.shape[2]]))
            parts.append(sound[0, 0, (start - first) * self.hop :].numpy())
        return np.concatenate(parts)[None]

    def _state(self, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """The generator's tensors; a training checkpoint also holds the discriminators."""
        assert self._url is not None
        path = local_path(self._url, "model.codec.weights.firefly")

        def ours(name: str) -> bool:
            return not name.startswith("discriminators.") and wanted(name.removeprefix(GENERATOR))

        for name, value in tensors(path, ours):
            yield name.removeprefix(GENERATOR), value


class Firefly(nn.Module):
    """The network under upstream's names."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        self.config = config
        self.spec_transform = LogMel(config)
        self.backbone = Backbone(config)
        self.quantizer = Quantizer(config)
        self.head = Head(config)

    def encode(
        self, audio: Float[Tensor, "B N"], lengths: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B K T"], Int[Tensor, " B"]]:
        """Codes, and how many frames of them are whole; ``audio`` is padded with zeros behind its ``lengths``."""
        codes = self.quantizer.encode(self.features(audio, lengths))
        return codes, lengths // self.config.hop // self.config.factor

    def decode(
        self, codes: Int[Tensor, "B K T"], lengths: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B 1 N"], Int[Tensor, " B"]]:
        """Sound of ``lengths`` frames, silent behind them, and its samples."""
        spectra = codes.shape[2] * self.config.factor
        lengths = lengths * self.config.factor
        hidden = self.quantizer.decode(codes) * _within(lengths, spectra)
        samples = lengths * self.config.hop
        return self.head(hidden) * _within(samples, spectra * self.config.hop), samples

    def features(self, audio: Float[Tensor, "B N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B C F"]:
        """What is quantised."""
        mels = self.spec_transform(audio)
        within = _within(lengths // self.config.hop, mels.shape[2])
        return self.backbone(mels * within) * within


class LogMel(nn.Module):
    """Logarithm of Slaney's mel bands of the magnitudes."""

    window: Tensor
    bands: Tensor

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        self.size, self.hop = config.window, config.hop
        bands = melscale_fbanks(
            config.window // 2 + 1, 0.0, config.sample_rate // 2, config.mels, config.sample_rate, "slaney", "slaney"
        )
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, audio: Float[Tensor, "B N"]) -> Float[Tensor, "B M F"]:
        """``F = N // hop``."""
        rest = self.size - self.hop
        padded = functional.pad(audio[:, None], (rest // 2, (rest + 1) // 2), mode="reflect")[:, 0]
        spectrum = torch.stft(padded, self.size, self.hop, window=self.window, center=False, return_complex=True)
        magnitude = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-6)
        return torch.log(torch.clamp((magnitude.mT @ self.bands).mT, min=1e-5))


class Backbone(nn.Module):
    """ConvNeXt in one dimension, without a change of rate."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        widths = config.widths
        stem = nn.Sequential(CausalConv(config.mels, widths[0], 7), ChannelNorm(widths[0]))
        changes = [
            nn.Sequential(ChannelNorm(before), nn.Conv1d(before, after, 1)) for before, after in pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *changes])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXt(width, config.kernel) for _ in range(depth)))
            for width, depth in zip(widths, config.depths, strict=True)
        )
        self.norm = ChannelNorm(widths[-1])

    def forward(self, states: Float[Tensor, "B M F"]) -> Float[Tensor, "B C F"]:
        """Features of each spectrum and those before it."""
        for change, stage in zip(self.downsample_layers, self.stages, strict=True):
            states = stage(change(states))
        return self.norm(states)


class Quantizer(nn.Module):
    """Fewer frames, a code for each group of channels, and back."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.residual_fsq = nn.Module()
        self.residual_fsq.rvqs = nn.ModuleList(
            ScalarQuantizer(width // config.groups, config.levels) for _ in range(config.groups)
        )
        self.downsample = nn.Sequential(
            *(nn.Sequential(CausalConv(width, width, by, stride=by), ConvNeXt(width)) for by in config.factors)
        )
        self.upsample = nn.Sequential(
            *(nn.Sequential(CausalUp(width, width, by, by), ConvNeXt(width)) for by in reversed(config.factors))
        )

    @property
    def groups(self) -> Iterator["ScalarQuantizer"]:
        """One quantiser for each group of channels."""
        return iter(self.residual_fsq.rvqs)  # type: ignore[arg-type]

    def encode(self, states: Float[Tensor, "B C F"]) -> Int[Tensor, "B K T"]:
        """Codes."""
        parts = self.downsample(states).mT.chunk(len(self.residual_fsq.rvqs), -1)  # type: ignore[arg-type]
        return torch.stack([group.encode(part) for group, part in zip(self.groups, parts, strict=True)], 1)

    def decode(self, codes: Int[Tensor, "B K T"]) -> Float[Tensor, "B C F"]:
        """Features again."""
        parts = [group.decode(row) for group, row in zip(self.groups, codes.unbind(1), strict=True)]
        return self.upsample(torch.cat(parts, -1).mT)


class ScalarQuantizer(nn.Module):
    """FSQ: a few numbers, each rounded to one of its levels, are the digits of a code, the first counting least."""

    def __init__(self, width: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        self.project_in = nn.Linear(width, len(levels))
        self.project_out = nn.Linear(len(levels), width)

    def encode(self, states: Float[Tensor, "B T c"]) -> Int[Tensor, "B T"]:
        """Codes. Numbers are bounded twice: once for the library's residual quantiser, once for the FSQ inside it."""
        levels = torch.tensor(self.levels, device=states.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = (levels % 2 == 0) * 0.5
        numbers = self.project_in(states)
        for _ in range(2):
            numbers = torch.tanh(numbers + torch.atanh(offset / half)) * half - offset
        digits = numbers.round().long() + levels // 2
        return (digits * self._places(levels)).sum(-1)

    def decode(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B T c"]:
        """Digits, from -1 to 1, back in the width of the group."""
        levels = torch.tensor(self.levels, device=codes.device)
        digits = codes[..., None] // self._places(levels) % levels
        return self.project_out((digits - levels // 2) / (levels // 2))

    @staticmethod
    def _places(levels: Tensor) -> Tensor:
        return levels.cumprod(0) // levels


class Head(nn.Module):
    """HiFi-GAN's generator with SiLU."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        widths = [config.channels >> step for step in range(len(config.rates) + 1)]
        self.conv_pre = CausalConv(config.widths[-1], widths[0], config.ends[0], normed=True)
        self.ups = nn.ModuleList(
            CausalUp(before, after, kernel, rate, normed=True)
            for before, after, kernel, rate in zip(widths, widths[1:], config.rate_kernels, config.rates, strict=False)
        )
        self.resblocks = nn.ModuleList(ParallelBlock(width, config) for width in widths[1:])
        self.conv_post = CausalConv(widths[-1], 1, config.ends[1], normed=True)

    def forward(self, states: Float[Tensor, "B C F"]) -> Float[Tensor, "B 1 N"]:
        """Sound, ``N = hop · F``."""
        states = self.conv_pre(states)
        for up, block in zip(self.ups, self.resblocks, strict=True):
            states = block(up(functional.silu(states)))
        return torch.tanh(self.conv_post(functional.silu(states)))


class ParallelBlock(nn.Module):
    """The mean of residual blocks of several kernels."""

    def __init__(self, width: int, config: FireflyConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(width, kernel, dilations)
            for kernel, dilations in zip(config.kernels, config.dilations, strict=True)
        )

    def forward(self, states: Float[Tensor, "B C N"]) -> Float[Tensor, "B C N"]:
        """At one rate."""
        return torch.stack([block(states) for block in self.blocks]).mean(0)


class ResidualBlock(nn.Module):
    """Pairs of convolutions, both dilated, each pair added to what it was given."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def convolutions() -> nn.ModuleList:
            return nn.ModuleList(CausalConv(width, width, kernel, dilation=each, normed=True) for each in dilations)

        self.convs1, self.convs2 = convolutions(), convolutions()

    def forward(self, states: Float[Tensor, "B C N"]) -> Float[Tensor, "B C N"]:
        """At one rate."""
        for first, second in zip(self.convs1, self.convs2, strict=True):
            states = states + second(functional.silu(first(functional.silu(states))))
        return states


class ConvNeXt(nn.Module):
    """A convolution of each channel by itself, then a feed-forward, scaled and added."""

    def __init__(self, width: int, kernel: int = 7) -> None:
        super().__init__()
        self.dwconv = CausalConv(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, states: Float[Tensor, "B C F"]) -> Float[Tensor, "B C F"]:
        """At one rate."""
        inner = self.norm(self.dwconv(states).mT)
        return states + (self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inner)))).mT


class ChannelNorm(nn.LayerNorm):
    """Layer norm of the channels, which are the second axis."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1e-6)

    def forward(self, input: Float[Tensor, "B C F"]) -> Float[Tensor, "B C F"]:
        """Each frame by itself."""
        return super().forward(input.mT).mT


class CausalConv(nn.Module):
    """A convolution that sees no future: all its padding is on the left, but for what fills the last stride."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        normed: bool = False,
    ) -> None:
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups)
        self.conv = weight_norm(conv) if normed else conv
        self.stride = stride
        self.before = (kernel - 1) * dilation + 1 - stride

    def forward(self, states: Float[Tensor, "B C N"]) -> Float[Tensor, "B D M"]:
        """``M = ceil(N / stride)``."""
        return self.conv(functional.pad(states, (self.before, -states.shape[-1] % self.stride)))


class CausalUp(nn.Module):
    """A transposed convolution that sees no future: what it gives beyond ``stride`` times the length is cut off."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, normed: bool = False) -> None:
        super().__init__()
        conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride)
        self.conv = weight_norm(conv) if normed else conv
        self.stride = stride

    def forward(self, states: Float[Tensor, "B C N"]) -> Float[Tensor, "B D M"]:
        """``M = stride · N``."""
        return self.conv(states)[..., : states.shape[-1] * self.stride]


def _decides_codes(name: str) -> bool:
    return not name.startswith("head.")


def _within(lengths: Int[Tensor, " B"], size: int) -> Bool[Tensor, "B 1 size"]:
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]

"""Sampling: steps along the flow, guided by the difference that tags and lyrics make.

Guidance is adaptive projected guidance (Sadat et al. 2024, https://arxiv.org/abs/2410.02416) with momentum, in the
middle part of the steps only. What it leads away from is not the absence of conditions but conditions seen dimly: the
queries of some layers are weakened (upstream calls it ERG). All constants and samplers:
ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``pipeline_ace_step.py`` and ``schedulers/``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise

import torch
from torch import Tensor, nn

from trainer.families.base import unwrapped
from trainer.shapes import Float

from .network import AceStepNetwork, Conditions, Frames
from .objective import SHIFT, TIMESTEPS, clean, noisy, sampling_sigmas

Flow = Callable[[Float[Tensor, "B C F T"], Float[Tensor, ""]], Float[Tensor, "B C F T"]]
"""Latents with noise and their σ → the velocity."""


@dataclass(frozen=True)
class Sampler:
    """How noise becomes latents.

    Attributes:
        sampler: ``euler``; ``heun``, which goes on along the mean of the velocities at both ends of a step (but for
            the last, whose end is no noise); or ``pingpong``, which goes to the end and back with fresh noise.
        steps: from noise to latents.
        guidance: its strength; 1 is off.
        least_guidance: what the strength falls towards.
        decay: how much of the way it falls, over the guided steps.
        interval: the middle share of the calls that is guided; of as many calls as there are steps. Heun calls almost
            twice as often, and so is guided in the first half: as upstream.
        momentum: share of the last differences that stays.
        norm: longest difference, for each channel.
        parallel: how much of the difference along the prediction itself is kept.
        omega: steps are stretched about their mean by 0.9 … 1.1; 0 is no stretch. Not those of ``pingpong``.
        omega_over_batch: about one mean for the batch, as upstream; a song then depends on its neighbours.
        tau: what weakened queries are multiplied by.
        weak_lyric_layers: first and last + 1 of the lyric encoder's layers; none: guided away from no lyrics at all.
        weak_blocks: the same of the transformer's blocks; none: the blocks are the same.
        shift: of σ.
        timesteps: length of σ's training table.
    """

    sampler: str
    steps: int
    guidance: float
    least_guidance: float = 3.0
    decay: float = 0.0
    interval: float = 0.5
    momentum: float = -0.75
    norm: float = 2.5
    parallel: float = 0.0
    omega: float = 10.0
    omega_over_batch: bool = False
    tau: float = 0.01
    weak_lyric_layers: tuple[int, int] | None = (4, 6)
    weak_blocks: tuple[int, int] | None = (15, 20)
    shift: float = SHIFT
    timesteps: int = TIMESTEPS


@torch.no_grad()
def generate(
    network: nn.Module,
    noise: Iterator[Float[Tensor, "B C F T"]],
    conditions: Conditions,
    dim_text: Float[Tensor, "B L text_width"],
    frames: Frames,
    sampler: Sampler,
) -> Iterator[tuple[Float[Tensor, "B C F T"], Float[Tensor, "B C F T"]]]:
    """After each call of the network, the guided velocity and the latents.

    Args:
        network: in eval mode; may be wrapped by PEFT.
        noise: where the songs start, and then what ``pingpong`` adds, step by step.
        conditions: what they are made from.
        dim_text: tags as the dim side of the guidance sees them; zeros for none.
        frames: which of the frames are the songs'.
        sampler: the rest.
    """
    core = unwrapped(network, AceStepNetwork)
    clear, dim = core.encode(conditions), _dim_context(core, conditions, dim_text, sampler)
    sigmas = sampling_sigmas(sampler.steps, sampler.shift, sampler.timesteps).to(clear.hidden.device)
    first, last = (int(sampler.steps * (0.5 + sign * sampler.interval / 2)) for sign in (-1, 1))
    calls, running = count(), torch.zeros(())

    def flow(latents: Tensor, sigma: Tensor) -> Tensor:
        nonlocal running
        call, timestep = next(calls), (sampler.timesteps * sigma).expand(len(latents))
        velocity = _masked(core.decode(latents, timestep, clear, frames)[0], frames)
        if not first <= call < last or sampler.guidance <= 1:
            return velocity
        with weakened(_query_layers(core, sampler), sampler.tau):
            other = _masked(core.decode(latents, timestep, replace(clear, hidden=dim), frames)[0], frames)
        running = velocity - other + sampler.momentum * running
        strength = _strength(sampler, (call - first) / max(last - first - 1, 1))
        return velocity + (strength - 1) * projected(running, velocity, sampler)

    yield from follow(flow, noise, sigmas, frames, sampler)


def follow(
    flow: Flow,
    noise: Iterator[Float[Tensor, "B C F T"]],
    sigmas: Float[Tensor, " steps+1"],
    frames: Frames,
    sampler: Sampler,
) -> Iterator[tuple[Float[Tensor, "B C F T"], Float[Tensor, "B C F T"]]]:
    """The same for any ``flow``, from σ to σ."""
    latents = next(noise)
    for sigma, then in pairwise(sigmas):
        start, velocity = latents, flow(latents, sigma)
        if sampler.sampler == "pingpong":
            latents = noisy(clean(start, velocity, sigma[None]), next(noise), then[None])
        else:
            latents = start + _stretched((then - sigma) * velocity, frames, sampler)
        yield velocity, latents
        if sampler.sampler == "heun" and then > 0:
            second = flow(latents, then)
            latents = start + _stretched((then - sigma) * (velocity + second) / 2, frames, sampler)
            yield second, latents


def projected(
    difference: Float[Tensor, "B C F T"], velocity: Float[Tensor, "B C F T"], sampler: Sampler
) -> Float[Tensor, "B C F T"]:
    """``difference`` no longer than ``sampler.norm``, without its part along ``velocity`` (over ``F`` and ``T``)."""
    length = difference.norm(dim=(2, 3), keepdim=True)
    difference = (difference * (sampler.norm / length).clamp(max=1)).double()
    direction = velocity.double()
    direction = direction / direction.norm(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    along = (difference * direction).sum((2, 3), keepdim=True) * direction
    return (difference - (1 - sampler.parallel) * along).to(velocity.dtype)


@contextmanager
def weakened(layers: Iterable[nn.Module], tau: float) -> Iterator[None]:
    """Inside the ``with``, what ``layers`` put out is multiplied by ``tau``."""

    def weaken(_module: nn.Module, _given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * tau

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(weaken).remove)
        yield


def _dim_context(core: AceStepNetwork, conditions: Conditions, dim_text: Tensor, sampler: Sampler) -> Tensor:
    dim = replace(conditions, text_hidden=dim_text, speaker=torch.zeros_like(conditions.speaker))
    if sampler.weak_lyric_layers is None:
        return core.encode(replace(dim, lyric_ids=torch.zeros_like(dim.lyric_ids))).hidden
    layers = core.lyric_encoder.encoders[slice(*sampler.weak_lyric_layers)]
    with weakened((layer.get_submodule("self_attn.linear_q") for layer in layers), sampler.tau):
        return core.encode(dim).hidden


def _query_layers(core: AceStepNetwork, sampler: Sampler) -> Iterator[nn.Module]:
    for block in core.transformer_blocks[slice(*sampler.weak_blocks)] if sampler.weak_blocks else ():
        yield from (block.get_submodule(f"{name}.to_q") for name in ("attn", "cross_attn"))


def _strength(sampler: Sampler, progress: float) -> float:
    return sampler.guidance - sampler.decay * progress * (sampler.guidance - sampler.least_guidance)


def _stretched(change: Tensor, frames: Frames, sampler: Sampler) -> Tensor:
    factor = 0.9 + 0.2 / (1 + math.exp(-0.1 * sampler.omega))
    over = (0, 1, 2, 3) if sampler.omega_over_batch else (1, 2, 3)
    weight = frames.inside[:, None, None].expand_as(change)
    mean = change.sum(over, keepdim=True) / weight.sum(over, keepdim=True)
    return ((change - mean) * factor + mean) * weight


def _masked(velocity: Tensor, frames: Frames) -> Tensor:
    return velocity * frames.inside[:, None, None]

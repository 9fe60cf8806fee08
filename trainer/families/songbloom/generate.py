"""Generation, a block at a time: sample its sketch with guidance, render it by Euler steps, tell the planner.

Follows upstream's sampler (tencent-ailab/SongBloom@ef78022): guidance on logits and on the flow, a repetition penalty,
noise mixed in again at a "temperature" of the flow. Every song has random numbers of its own, drawn from its seed, so
that it does not depend on what else is in the batch. The number of network calls follows from the prompts and what is
sampled from them: ranks that share a sharded network stay in step when they are given the same prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainer.families.base import unwrapped
from trainer.families.sampling import sample
from trainer.shapes import Float, Int

from .network import SongBloom
from .transformer import Cache


@dataclass(frozen=True)
class Settings:
    """How a song is sampled.

    Attributes:
        plan_guidance: of the logits; 1 is off.
        flow_guidance: of the flow.
        temperature: of the logits.
        top_k: ids that are sampled from; 0 is all.
        steps: Euler steps a block.
        flow_temperature: where the flow, until then without noise, is given noise; from 1 on, it starts from noise.
        repetition_penalty: what the logits of recent ids are divided by; 1 is off.
        penalty_window: how many ids are recent (the releases').
    """

    plan_guidance: float
    flow_guidance: float
    temperature: float
    top_k: int
    steps: int
    flow_temperature: float
    repetition_penalty: float
    penalty_window: int = 50


class Draws(Protocol):
    """One song's random numbers."""

    def chances(self, block: int, count: int) -> Float[np.ndarray, " count"]:
        """Uniform numbers in [0, 1) that choose the ids of ``block``."""
        ...

    def noise(self, block: int, shape: tuple[int, int]) -> Float[np.ndarray, "P C"]:
        """Standard normal noise of ``block``."""
        ...


class SeededDraws:
    """Random numbers that follow from a seed and the block alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def chances(self, block: int, count: int) -> Float[np.ndarray, " count"]:
        """Uniform numbers in [0, 1)."""
        return np.random.default_rng((self._seed, block, 0)).random(count)

    def noise(self, block: int, shape: tuple[int, int]) -> Float[np.ndarray, "P C"]:
        """Standard normal noise."""
        return np.random.default_rng((self._seed, block, 1)).standard_normal(shape, np.float32)


@torch.no_grad()
def generate(
    network: nn.Module,
    lyrics: Int[Tensor, "2B 3 tokens"],
    prompt: Float[Tensor, "B frames C"],
    frames: Sequence[int],
    draws: Sequence[Draws],
    settings: Settings,
) -> list[tuple[Int[np.ndarray, " T"], Float[np.ndarray, "C T"]]]:
    """Sketch and latents of each song, whole blocks.

    Args:
        network: in eval mode; may be wrapped by PEFT, or sharded.
        lyrics: token, structure and sentence of each position, of the songs and then of as many without lyrics.
        prompt: latents of the styles, zeros where there is none.
        frames: how long each song may get; it ends before if the planner says so.
        draws: of each song.
        settings: of the sampling.
    """
    core = unwrapped(network, SongBloom)
    config, device = core.config, core.bos_token.device
    limits = torch.tensor([-(-count // config.block) for count in frames], device=device)
    blocks = int(limits.max())
    cache = Cache(config.prompt_length + config.lyric_length + 1 + blocks * (config.block + 1))
    prompts = torch.cat([prompt, torch.zeros_like(prompt)])
    logits = network("start", lyrics.to(device), prompts.to(device), cache)
    sketch = torch.zeros(len(frames), 0, dtype=torch.int64, device=device)
    latents = torch.zeros(len(frames), 0, config.latent_dim, device=device)
    previous = latents.new_zeros(len(frames), config.block, config.latent_dim)
    length = torch.zeros_like(limits)
    going = limits > 0
    for block in range(blocks):
        chances = torch.from_numpy(np.stack([song.chances(block, config.block) for song in draws])).to(device)
        ids, h = _sketch(network, logits, sketch, chances, cache, settings)
        going = going & (ids != config.eos).all(1) & (limits > block)
        if not going.any():
            break
        noise = np.stack([song.noise(block, (config.block, config.latent_dim)) for song in draws])
        previous = _render(network, h, ids, previous, torch.from_numpy(noise).to(device), settings)
        sketch, latents = torch.cat([sketch, ids], 1), torch.cat([latents, previous], 1)
        length += going * config.block
        if block + 1 < blocks:
            logits = network("next_block", previous.repeat(2, 1, 1), cache)
    return [
        (ids[:count].cpu().numpy(), song[:count].T.cpu().numpy())
        for ids, song, count in zip(sketch, latents, length.tolist(), strict=True)
    ]


def _sketch(
    network: nn.Module,
    logits: Float[Tensor, "2B V"],
    before: Int[Tensor, "B T"],
    chances: Float[Tensor, "B P"],
    cache: Cache,
    settings: Settings,
) -> tuple[Int[Tensor, "B P"], Float[Tensor, "B D"]]:
    """Ids of the next block, and the planner's state after them."""
    ids, h = before, logits.new_zeros(0)
    for chance in chances.unbind(1):
        conditional, without = logits.chunk(2)
        guided = without + settings.plan_guidance * (conditional - without)
        if before.shape[1]:
            guided = _penalised(guided, ids[:, -settings.penalty_window :], settings.repetition_penalty)
        ids = torch.cat([ids, sample(guided, chance, settings.temperature, settings.top_k)[:, None]], dim=1)
        logits, h = network("next_token", ids[:, -1].repeat(2), cache)
    return ids[:, before.shape[1] :], h[: len(ids)]


def _penalised(logits: Float[Tensor, "B V"], recent: Int[Tensor, "B window"], penalty: float) -> Float[Tensor, "B V"]:
    """Divided whatever their sign, as upstream does; the end is never penalised."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, recent, True)
    seen[:, -1] = False
    return torch.where(seen, logits / penalty, logits)


def _render(
    network: nn.Module,
    h: Float[Tensor, "B D"],
    ids: Int[Tensor, "B P"],
    previous: Float[Tensor, "B P C"],
    noise: Float[Tensor, "B P C"],
    settings: Settings,
) -> Float[Tensor, "B P C"]:
    """Latents of a block, by Euler steps from t = 1 to 0."""
    told = torch.arange(2 * len(h), device=h.device) < len(h)
    fixed = (h.repeat(2, 1), ids.repeat(2, 1), previous.repeat(2, 1, 1))
    renewal = settings.flow_temperature
    x = noise if renewal >= 1 else torch.zeros_like(noise)
    for now, then in pairwise(torch.linspace(1, 0, settings.steps + 1).tolist()):
        t = torch.full((len(told),), now, device=h.device)
        velocity = network("velocity", *fixed, x.repeat(2, 1, 1), t, told, told).float()
        conditional, without = velocity.chunk(2)
        v = without + settings.flow_guidance * (conditional - without)
        x = (1 - then) * (x - v) + then * noise if now > renewal >= then else x + (then - now) * v
    return x

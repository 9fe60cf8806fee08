"""Flow matching from noise to latents, with upstream's weights.

``x = σ · noise + (1 - σ) · latents``; the network predicts ``v = noise - latents`` (Lipman et al. 2022,
https://arxiv.org/abs/2210.02747). The loss is the squared error of the latents ``x - σ · v`` that follow, which is σ²
times the squared error of ``v``. σ is a logit-normal draw (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section
3.1) from a table of 1000, shifted towards noise (section 5.3.2). Table, draw and loss:
ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``trainer.py`` and ``schedulers/``.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.shapes import Bool, Float, Int

TIMESTEPS = 1000
SHIFT = 3.0


def training_sigmas(shift: float = SHIFT, timesteps: int = TIMESTEPS) -> Float[Tensor, " timesteps"]:
    """The table that training draws from, falling from 1; a timestep is ``timesteps · σ``."""
    return _shifted(torch.arange(timesteps, 0, -1, dtype=torch.float64) / timesteps, shift).float()


def sampling_sigmas(steps: int, shift: float = SHIFT, timesteps: int = TIMESTEPS) -> Float[Tensor, " steps+1"]:
    """σ before each step of sampling and after the last, 1 to 0.

    Even steps between the ends of the training table, shifted a second time: as upstream's scheduler does.
    """
    table = training_sigmas(shift, timesteps).double()
    even = torch.linspace(float(table[0]), float(table[-1]), steps, dtype=torch.float64)
    return functional.pad(_shifted(even, shift), (0, 1)).float()


def timestep_index(draws: Float[Tensor, " B"], timesteps: int = TIMESTEPS) -> Int[Tensor, " B"]:
    """Places in the training table, of standard normal draws."""
    return (draws.sigmoid() * timesteps).long().clamp(0, timesteps - 1)


def noisy(
    latents: Float[Tensor, "B C F T"], noise: Float[Tensor, "B C F T"], sigma: Float[Tensor, " B"]
) -> Float[Tensor, "B C F T"]:
    """What the network is given."""
    share = sigma[:, None, None, None]
    return share * noise + (1 - share) * latents


def clean(
    given: Float[Tensor, "B C F T"], velocity: Float[Tensor, "B C F T"], sigma: Float[Tensor, " B"]
) -> Float[Tensor, "B C F T"]:
    """The latents that follow from what the network was given and what it predicted."""
    return given - sigma[:, None, None, None] * velocity


def squared_error(
    found: Float[Tensor, "B C F T"], wanted: Float[Tensor, "B C F T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Summed over each song's own frames."""
    return ((found - wanted) * mask[:, None, None]).square().sum((1, 2, 3))


def ssl_distance(guess: Float[Tensor, "T W"], features: Float[Tensor, "L W"]) -> Float[Tensor, ""]:
    """``1 - cosine`` summed over the ``L`` frames of an SSL encoder, the guess stretched to that many."""
    stretched = functional.interpolate(guess.float().T[None], len(features), mode="linear", align_corners=False)[0].T
    return (1 - functional.cosine_similarity(stretched, features.float(), dim=-1)).sum()


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)

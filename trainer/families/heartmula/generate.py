"""Sampling frame by frame: key-value cache, classifier-free guidance, a stop at the end of the song.

As upstream's ``HeartMuLaGenPipeline`` (``src/heartlib/pipelines/music_generation.py``, HeartMuLa/heartlib@3981c52), for
several songs at once. Every song has random numbers of its own, drawn from its seed before anything else, so that it
does not depend on what else is in the batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.families.base import unwrapped
from trainer.families.sampling import draw_table, sample
from trainer.shapes import Bool, Float, Int

from .network import HeartMuLaNetwork, RowCache

Take = Callable[[int, int, Float[Tensor, "B V"]], Int[Tensor, " B"]]
"""Frame, codebook and the logits after guidance → codes."""


@torch.no_grad()
def generate(
    network: nn.Module,
    prompts: Sequence[Int[Tensor, "_ K1"]],
    slots: Sequence[int],
    frames: Sequence[int],
    guidance: float,
    take: Take,
) -> list[Int[np.ndarray, "K T"]]:
    """Codes of at most ``frames[b]`` frames for each prompt ``b``, up to the end of its song.

    A frame with an id from ``audio_eos_id`` on is the end, unless it is the first (as upstream has it).

    Args:
        network: in eval mode; may be wrapped by PEFT, or sharded.
        prompts: rows of text.
        slots: row of the reference audio in each.
        frames: at least 1 each.
        guidance: logits are ``unconditional + guidance · (conditional - unconditional)``; 1 is off.
        take: codes from logits.
    """
    core = unwrapped(network, HeartMuLaNetwork)
    device, songs, guided = core.muq_linear.bias.device, len(prompts), guidance > 1
    tokens, mask, slot = (x.to(device).repeat(1 + guided, *[1] * (x.ndim - 1)) for x in _padded(prompts, slots))
    unconditional = torch.arange(len(tokens), device=device) >= songs
    ends = torch.tensor(frames, device=device)
    cache = RowCache()
    made: list[Tensor] = []

    def choose(book: int, logits: Tensor) -> Tensor:
        logits = logits.float()
        if guided:
            conditional, without = logits.chunk(2)
            logits = without + guidance * (conditional - without)
        return take(len(made), book, logits).repeat(1 + guided)

    while len(made) < int(ends.max()):
        codes = network(tokens, mask, unconditional, slot if not made else None, cache=cache, choose=choose)
        ended = (codes[:songs] >= core.config.audio_eos_id).any(1)
        if made:
            ends = torch.where(ended, ends.clamp(max=len(made)), ends)
        made.append(codes[:songs])
        tokens = nn.functional.pad(codes, (0, 1))[:, None]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[..., -1] = False
    together = torch.stack(made, -1).cpu().numpy()
    return [song[:, :count] for song, count in zip(together, ends.tolist(), strict=True)]


def sampler(seeds: Sequence[int], frames: int, books: int, *, temperature: float, top_k: int) -> Take:
    """Temperature and top-k; the code taken is where the cumulative probability passes the song's random number."""
    draws = draw_table([frames] * len(seeds), seeds, books)

    def take(frame: int, book: int, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        return sample(logits, draws[:, frame, book].to(logits.device), temperature, top_k)

    return take


def _padded(
    prompts: Sequence[Int[Tensor, "_ K1"]], slots: Sequence[int]
) -> tuple[Int[Tensor, "B S K1"], Bool[Tensor, "B S K1"], Int[Tensor, " B"]]:
    """Prompts padded on the left, which columns count, and the slots' rows."""
    longest = max(map(len, prompts))
    missing = [longest - len(prompt) for prompt in prompts]
    tokens = torch.stack(
        [nn.functional.pad(prompt, (0, 0, left, 0)) for prompt, left in zip(prompts, missing, strict=True)]
    )
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[..., -1] = torch.arange(longest) >= torch.tensor(missing)[:, None]
    return tokens, mask, torch.tensor(missing) + torch.tensor(slots)

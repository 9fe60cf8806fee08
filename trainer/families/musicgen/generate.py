"""Sampling: delay pattern, key-value cache, classifier-free guidance.

Every song has a table of random numbers of its own, drawn from its seed before anything else, so that it does not
depend on what else is in the batch. The number of network calls follows from the longest song alone: ranks that share a
sharded network (ZeRO-3) stay in step when they are given the same prompts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from trainer.families.base import unwrapped
from trainer.families.sampling import draw_table, sample
from trainer.shapes import Bool, Float, Int

from .network import MusicGenNetwork


@torch.no_grad()
def generate(
    network: nn.Module,
    frames: Sequence[int],
    seeds: Sequence[int],
    text_hidden: Float[Tensor, "B L text_width"],
    text_mask: Bool[Tensor, "B L"],
    *,
    guidance: float,
    temperature: float,
    top_k: int,
) -> list[Int[np.ndarray, "K T"]]:
    """Codes of ``frames[b]`` frames for each row ``b``.

    Args:
        network: in eval mode; may be wrapped by PEFT, or sharded.
        frames: length of each song, at least 1.
        seeds: of each song's random numbers.
        text_hidden: hidden states of the descriptions.
        text_mask: where they are text; a row without any is unconditional.
        guidance: of the logits (Copet et al. 2023, section 3.4); 1 is off.
        temperature: of the logits.
        top_k: ids that are sampled from; 0 is all.
    """
    core = unwrapped(network, MusicGenNetwork)
    device, books = core.enc_to_dec_proj.weight.device, core.config.num_codebooks
    guided = guidance > 1
    hidden, mask = text_hidden.to(device), text_mask.to(device)
    if guided:
        hidden, mask = torch.cat([hidden, hidden]), torch.cat([mask, torch.zeros_like(mask)])
    ends = torch.tensor(frames, device=device)[:, None]
    draws = draw_table([count + books - 1 for count in frames], seeds, books).to(device)
    cache = EncoderDecoderCache(DynamicCache(config=core.config), DynamicCache(config=core.config))
    column = torch.full((len(frames), books), core.pad, device=device)
    columns: list[Tensor] = []
    for step in range(max(frames) + books - 1):
        ids = column[..., None].repeat(1 + guided, 1, 1)
        logits = network(ids, hidden, mask, cache=cache)[:, :, -1].float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        sampled = sample(logits, draws[:, step], temperature, top_k)
        columns.append(sampled)
        frame = step - torch.arange(books, device=device)
        column = torch.where((frame >= 0) & (frame < ends), sampled, core.pad)
    delayed = torch.stack(columns, -1).cpu().numpy()
    return [_undelayed(row, count) for row, count in zip(delayed, frames, strict=True)]


def _undelayed(delayed: Int[np.ndarray, "K S"], frames: int) -> Int[np.ndarray, "K T"]:
    return np.stack([book[k : k + frames] for k, book in enumerate(delayed)])

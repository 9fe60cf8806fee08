"""Sampling: a token for each frame, then its codes one by one; key-value cache, nucleus, repetition penalty.

Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/models/text2semantic/inference.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.families.base import unwrapped
from trainer.families.sampling import passed
from trainer.shapes import Float, Int

from .network import FishSpeechNetwork

WINDOW = 16
"""Frames whose ids the penalty looks at."""


@dataclass(frozen=True)
class Sampler:
    """How an id is drawn from logits.

    Attributes:
        temperature: divides the logits.
        top_p: the likeliest ids whose probabilities sum up to this much stay (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751); 0 leaves the best.
        top_k: no more ids than this stay; 0 is no limit.
        repetition_penalty: of ids among the last frames; 1 is off (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    def __call__(
        self, logits: Float[Tensor, "B V"], draws: Float[Tensor, " B"], recent: Int[Tensor, "B W"] | None
    ) -> Int[Tensor, " B"]:
        """The id at which the cumulative probability passes the number drawn, for each row.

        Args:
            logits: of the ids.
            draws: in [0, 1).
            recent: ids that are penalised, each once.
        """
        logits = logits.float()
        if recent is not None:
            scores = logits.gather(1, recent)
            lower = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            logits = logits.scatter(1, recent, lower)
        ordered, ids = logits.sort(dim=1, descending=True, stable=True)
        out = ordered.softmax(1).cumsum(1) > self.top_p
        out[:, self.top_k or ordered.shape[1] :] = True
        out[:, 0] = False
        kept = (ordered / self.temperature).masked_fill(out, -torch.inf).double().softmax(1)
        return ids.gather(1, passed(kept, draws)[:, None]).squeeze(1)


@torch.no_grad()
def generate(
    network: nn.Module,
    prompts: Sequence[Int[Tensor, "1+K P"]],
    frames: Sequence[int],
    draws: Float[Tensor, "B F 1+K"],
    sampler: Sampler,
    end: int,
) -> list[Int[Tensor, "1+K F"]]:
    """Tokens and codes that follow each prompt, up to and with the ``end`` token.

    As upstream, the first frame is never penalised, never in the penalty's window and never the last.

    Args:
        network: in eval mode; may be wrapped by PEFT.
        prompts: tokens and codes, of any lengths.
        frames: the most that are made for each prompt.
        draws: random numbers in [0, 1) for each row, frame and id.
        sampler: how ids are drawn.
        end: the token after which a row is done.
    """
    core = unwrapped(network, FishSpeechNetwork)
    device = core.norm.weight.device
    lengths = torch.tensor([prompt.shape[1] for prompt in prompts], device=device)
    most, longest = max(frames), int(lengths.max())
    inputs = torch.stack([functional.pad(prompt, (0, longest - prompt.shape[1])) for prompt in prompts]).to(device)
    batch, rows, _ = inputs.shape
    draws, limits = draws.to(device), torch.tensor(frames, device=device)
    # A row's own frames overwrite the padding behind its prompt before anything attends to them.
    cache = core.cache(core.config.slow, batch, longest + most)
    positions = torch.arange(longest, device=device).expand(batch, -1)
    hidden = core.slow(inputs, positions=positions, cache=cache)[torch.arange(batch, device=device), lengths - 1]
    made = inputs.new_zeros(batch, rows, most)
    history = inputs.new_zeros(batch, rows, WINDOW + most)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(most):
        start = max(step - 1 - WINDOW, 0)
        recent = history[..., start : start + WINDOW] if step and sampler.repetition_penalty != 1 else None
        frame = _frame(core, hidden, draws[:, step], sampler, recent)
        made[..., step] = frame
        done |= limits <= step + 1
        if step:
            history[..., step - 1] = frame
            done |= frame[:, 0] == end
        if done.all():
            break
        hidden = core.slow(frame[..., None], positions=(lengths + step)[:, None], cache=cache)[:, 0]
    return [_until(row[:, :count], end) for row, count in zip(made, frames, strict=True)]


def _frame(
    core: FishSpeechNetwork,
    hidden: Float[Tensor, "B D"],
    draws: Float[Tensor, "B 1+K"],
    sampler: Sampler,
    recent: Int[Tensor, "B 1+K W"] | None,
) -> Int[Tensor, "B 1+K"]:
    """One frame. In 1.5 the token is penalised too and tells the first code; in 1.4 all codes are drawn."""
    books, batch = core.config.codebooks, len(hidden)

    def penalised(row: int) -> Tensor | None:
        return None if recent is None else recent[:, row]

    token = sampler(core.output(core.norm(hidden)), draws[:, 0], penalised(0) if core.code_in_token else None)
    cache = core.cache(core.config.fast, batch, books)
    states = core.fast_project_in(hidden)
    codes: list[Tensor] = []
    for book in range(books):
        at = torch.full((batch, 1), book, device=hidden.device)
        states = core.fast(states[:, None], positions=at, cache=cache)[:, 0]
        if book == 0 and core.code_in_token:
            code = (token - core.semantic.start).clamp(0, core.config.codebook_size - 1)
        else:
            code = sampler(core.fast_output(states), draws[:, book + 1], penalised(book + 1))
        codes.append(code)
        states = core.fast_embeddings(code)
    frame = torch.stack([token, *codes], 1)
    if not core.code_in_token:
        frame[:, 1:] *= (token == core.semantic.start)[:, None]
    return frame


def _until(frames: Int[Tensor, "1+K F"], end: int) -> Int[Tensor, "1+K F"]:
    ends = (frames[0, 1:] == end).nonzero()
    return frames if len(ends) == 0 else frames[:, : int(ends[0]) + 2]

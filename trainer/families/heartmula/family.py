"""The HeartMuLa family: what the trainer sees of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trainer.families import made_up
from trainer.families.base import Arrays, Autoregressive, Batch, Example, Predictions, unwrapped
from trainer.families.heartmula.spec import HeartMuLa
from trainer.shapes import Bool, Int
from trainer.spec.errors import DataError
from trainer.spec.job import Prompt, Sampling
from trainer.weights import configuration

from .objective import contexts, song_rows
from .text import Tokenize, open_tokenizer, prompt_rows
from .weights import Release, load_network, open_release, save_network

if TYPE_CHECKING:
    from .network import HeartMuLaConfig, HeartMuLaNetwork


class HeartMuLaFamily(Autoregressive):
    """HeartMuLa, configured by a job's ``model:`` section.

    The loss is ``ce0``, of the first codebook, plus ``ce_k``, the mean of the others'.
    """

    terms: Mapping[str, float] = {"ce0": 1.0, "ce_k": 1.0}
    frame_rate = 12.5

    def __init__(self, model: HeartMuLa) -> None:
        self.model = model
        self.segment_seconds = model.segment_seconds

    @property
    def codebooks(self) -> int:
        """Of the network's configuration."""
        return self.config.audio_num_codebooks

    @property
    def vocabulary(self) -> int:
        """Of the codec: the network's ids from the one before ``audio_eos_id`` on are no codes."""
        return self.config.audio_eos_id - 1

    @classmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """Nothing but the family, known by ``model_type``."""
        return {} if configuration(url).get("model_type") == "heartmula" else None

    def network(self) -> "HeartMuLaNetwork":
        """The network with the weights of ``model.pretrained``, on the CPU in fp32."""
        return load_network(self.release)

    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the network in the format of the official release."""
        from .network import HeartMuLaNetwork

        save_network(self.release, unwrapped(network, HeartMuLaNetwork), folder, values)

    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """None: text is tokenised as it is read."""
        return [{} for _ in texts]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """``tokens``, ``mask`` [B, S, K+1], ``slot``, ``unconditional`` [B] and ``depth`` [B, S]; padded right.

        In training each song draws whether its text is dropped, then the frames that the depth decoder is trained on.

        Raises:
            DataError: prompt and song have more rows than the network has positions.
        """
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        slots: list[int] = []
        dropped: list[bool] = []
        for example in examples:
            prompt, slot = self._prompt(example.text.get("tags", ""), example.text.get("lyrics", ""))
            codes = torch.from_numpy(example.arrays["codes"].astype(np.int64))
            self._check_length(len(prompt), codes.shape[1], f"song {example.id}")
            end = self.config.audio_eos_id if example.ends else None
            tokens, mask = song_rows(prompt, codes, end)
            draw = np.random.Generator(np.random.PCG64(example.seed))
            dropped.append(training and draw.random() < self.model.cfg_dropout)
            share = self.model.depth_fraction if training else 1.0
            rows.append((tokens, mask, _share_of(mask[:, 0], share, draw)))
            slots.append(slot)
        tokens, mask, depth = (nn.utils.rnn.pad_sequence(list(column), True) for column in zip(*rows, strict=True))
        tensors = {
            "tokens": tokens,
            "mask": mask,
            "depth": depth,
            "slot": torch.tensor(slots),
            "unconditional": torch.tensor(dropped),
        }
        counts = {"ce0": float(mask[..., 0].sum()), "ce_k": float(depth.sum() * (self.codebooks - 1))}
        return Batch(tensors, counts, sum(example.arrays["codes"].shape[1] for example in examples))

    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """``codes``."""
        return {"codes": made_up.codes(self, frames, draw)}

    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy summed over the frames (``ce0``), and over depth frames and the other codebooks (``ce_k``)."""
        books = network(**batch.tensors)
        return {"ce0": books[0], "ce_k": books[1:].sum()}

    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """``codes`` [K, T] of songs that end where the network ends them, ``seconds`` at the latest.

        Ids that are no codes (upstream keeps a first frame whatever it holds) become 0.

        Raises:
            DataError: a prompt with its song is longer than the network has positions.
        """
        from .generate import generate, sampler

        frames = [max(round(prompt.seconds * self.frame_rate), 1) for prompt in prompts]
        texts = [self._prompt(prompt.tags, prompt.lyrics) for prompt in prompts]
        for index, ((rows, _), count) in enumerate(zip(texts, frames, strict=True)):
            self._check_length(len(rows), count, f"prompt {index + 1}")
        told = sampling.given
        guidance = told.pop("guidance")
        take = sampler([prompt.seed for prompt in prompts], max(frames), self.codebooks, **told)
        rows, slots = zip(*texts, strict=True)
        songs = generate(network, rows, slots, frames, guidance, take)
        return [{"codes": np.where(codes < self.vocabulary, codes, 0).astype(np.uint16)} for codes in songs]

    def greedy(self, network: nn.Module, example: Example, frames: int) -> Batch:
        """As ``collate`` makes it, without an end."""
        from .generate import generate

        rows, slot = self._prompt(example.text.get("tags", ""), example.text.get("lyrics", ""))
        (codes,) = generate(network, [rows], [slot], [frames], 1, lambda _, __, logits: logits.argmax(-1))
        song = replace(example, arrays={**example.arrays, "codes": codes}, ends=False)
        return self.collate([song], training=False)

    def predictions(self, network: nn.Module, batch: Batch) -> list[Predictions]:
        """The first codebook sees the frames before its own; the others see their own too, of which they are a part."""
        from .network import HeartMuLaNetwork

        core = unwrapped(network, HeartMuLaNetwork)
        tokens, mask, unconditional, slot = (batch.tensors[n] for n in ("tokens", "mask", "unconditional", "slot"))
        hidden = core.hidden(core.embed(tokens, mask, unconditional, slot), mask)
        context, codes = contexts(hidden, tokens, mask[..., 0])
        inner = core.depth(context, codes[:, :-1])
        books = [core.logits(book, inner[:, book] if book else context) for book in range(self.codebooks)]
        frames = torch.arange(len(codes), device=codes.device)
        seen = torch.stack([frames + bool(book) for book in range(self.codebooks)])
        return [Predictions(torch.cat(books), codes.T.flatten(), seen.flatten())]

    @cached_property
    def release(self) -> Release:
        """Where the weights are, and their shape."""
        return open_release(self.model.pretrained)

    @cached_property
    def config(self) -> "HeartMuLaConfig":
        """The network's configuration."""
        return self.release.config

    @cached_property
    def _tokenize(self) -> Tokenize:
        return open_tokenizer(self.release, self.model.tokenizer)

    def _prompt(self, tags: str, lyrics: str) -> tuple[Int[Tensor, "S K1"], int]:
        return prompt_rows(tags, lyrics, self._tokenize, self.config)

    def _check_length(self, prompt: int, frames: int, whose: str) -> None:
        most = self.config.backbone.max_seq_len - prompt - 1
        if frames > most:
            raise DataError(
                f"{whose} has {prompt} rows of text and {frames} frames ({frames / self.frame_rate:.1f} s), "
                f"the network has positions for {max(most, 0)} frames beside that text",
                "shorten the lyrics or ask for less (model.segment_seconds, validation.prompts.seconds)",
            )


def _share_of(frames: Bool[Tensor, " S"], share: float, draw: np.random.Generator) -> Bool[Tensor, " S"]:
    """Some of ``frames``, at least one."""
    found = frames.nonzero().squeeze(1)
    kept = draw.permutation(len(found))[: max(round(share * len(found)), 1)]
    return torch.zeros_like(frames).index_fill(0, found[kept], True)

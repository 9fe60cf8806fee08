"""HeartMuLa's network: a Llama over the rows of a song and a small one over the codes of each frame.

A row of tokens has ``K + 1`` columns: the ``K`` codes of a frame and, last, a text token. Its embedding is the sum over
the columns that count: text rows count the last column, frames the others, padding none
(``src/heartlib/heartmula/modeling_heartmula.py``, HeartMuLa/heartlib@3981c52).

Legend: ``B`` batch, ``S`` rows, ``N`` frames, ``K`` codebooks, ``D`` width, ``V`` ids of a codebook, ``P`` rows seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.shapes import Bool, Float, Int

from .llama import Cache, Llama, LlamaConfig
from .objective import cross_entropy_sums

Choose = Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]]
"""Codebook, its logits → the code taken in each row of the batch."""


@dataclass(frozen=True)
class HeartMuLaConfig:
    """Sizes under upstream's names, and the ids with a meaning."""

    backbone: LlamaConfig
    decoder: LlamaConfig
    text_vocab_size: int = 128_256
    audio_vocab_size: int = 8197
    audio_num_codebooks: int = 8
    muq_dim: int = 512
    text_bos_id: int = 128_000
    text_eos_id: int = 128_001
    audio_eos_id: int = 8193


class HeartMuLaNetwork(nn.Module):
    """Both stacks, embeddings and heads, under upstream's names."""

    def __init__(self, config: HeartMuLaConfig) -> None:
        super().__init__()
        width, inner = config.backbone.embed_dim, config.decoder.embed_dim
        books, ids = config.audio_num_codebooks, config.audio_vocab_size
        self.config = config
        self.backbone = Llama(config.backbone)
        self.decoder = Llama(config.decoder)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, width)
        self.audio_embeddings = nn.Embedding(books * ids, width)
        self.unconditional_text_embedding = nn.Embedding(1, width)
        self.projection = nn.Linear(width, inner, bias=False)
        self.codebook0_head = nn.Linear(width, ids, bias=False)
        self.audio_head = nn.Parameter(torch.randn(books - 1, inner, ids) / inner**0.5)
        self.muq_linear = nn.Linear(config.muq_dim, width)
        self.muq_linear.weight.requires_grad_(False)  # there is no reference audio: it only ever sees zeros

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers' activations in the backward pass."""
        self.backbone.checkpointing = self.decoder.checkpointing = True

    def forward(
        self,
        tokens: Int[Tensor, "B S K1"],
        mask: Bool[Tensor, "B S K1"],
        unconditional: Bool[Tensor, " B"],
        slot: Int[Tensor, " B"] | None = None,
        *,
        depth: Bool[Tensor, "B S"] | None = None,
        cache: "RowCache | None" = None,
        choose: Choose | None = None,
    ) -> Tensor:
        """Loss sums [K] over the frames; with ``choose``, the codes [B, K] of the frame that comes next.

        Args:
            tokens: rows, padded on the right; on the left where there is a ``cache``.
            mask: the columns that count.
            unconditional: songs whose text and slot are the unconditional embedding.
            slot: row of each song's reference audio, if it is among these.
            depth: frames on which codebooks 1 … K-1 are trained.
            cache: of the rows before these; these are added to it.
            choose: takes a code from its logits, one codebook after the other.
        """
        hidden = self.hidden(self.embed(tokens, mask, unconditional, slot), mask, cache)
        if choose is None:
            return cross_entropy_sums(self, hidden, tokens, mask[..., 0], mask[..., 0] if depth is None else depth)
        return self._next_frame(hidden[:, -1], choose)

    def embed(
        self,
        tokens: Int[Tensor, "B S K1"],
        mask: Bool[Tensor, "B S K1"],
        unconditional: Bool[Tensor, " B"],
        slot: Int[Tensor, " B"] | None,
    ) -> Float[Tensor, "B S D"]:
        """What the backbone sees. The slot holds no reference audio (nor does upstream's): a MuQ embedding of zeros."""
        nothing = self.unconditional_text_embedding(torch.zeros_like(tokens[:1, 0, 0]))
        text = self.text_embeddings(tokens[..., -1])
        text = torch.where(unconditional[:, None, None], nothing, text)
        hidden = text * mask[..., -1:] + (self.embed_codes(tokens[..., :-1]) * mask[..., :-1, None]).sum(
            2, dtype=text.dtype
        )
        if slot is None:
            return hidden
        reference = self.muq_linear(nothing.new_zeros(1, self.config.muq_dim))
        reference = torch.where(unconditional[:, None], nothing, reference)
        at_slot = torch.arange(tokens.shape[1], device=tokens.device) == slot[:, None]
        return torch.where(at_slot[..., None], reference[:, None].to(hidden.dtype), hidden)

    def embed_codes(self, codes: Int[Tensor, "*rows k"], first: int = 0) -> Float[Tensor, "*rows k D"]:
        """Embeddings of the codes of codebooks ``first`` and those after it."""
        books = torch.arange(first, first + codes.shape[-1], device=codes.device)
        return self.audio_embeddings(codes + books * self.config.audio_vocab_size)

    def hidden(
        self, embeddings: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S K1"], cache: "RowCache | None" = None
    ) -> Float[Tensor, "B S D"]:
        """The backbone's hidden states; those of padding mean nothing."""
        if cache is None:
            return self.backbone(embeddings)
        return self.backbone(embeddings, cache, *cache.see(mask.any(-1)))

    def depth(
        self, context: Float[Tensor, "N D"], codes: Int[Tensor, "N k"], cache: Cache | None = None
    ) -> Float[Tensor, "N K D2"]:
        """The depth decoder's hidden states after a frame's context, its first code, its second, … ."""
        return self.decoder(self.projection(torch.cat([context[:, None], self.embed_codes(codes)], 1)), cache)

    def logits(self, book: int, hidden: Float[Tensor, "N width"]) -> Float[Tensor, "N V"]:
        """Of codebook 0 from the backbone's hidden states, of the others from the depth decoder's."""
        return self.codebook0_head(hidden) if book == 0 else hidden @ self.audio_head[book - 1]

    def _next_frame(self, context: Float[Tensor, "B D"], choose: Choose) -> Int[Tensor, "B K"]:
        codes = [choose(0, self.logits(0, context))]
        cache = Cache()
        hidden = self.depth(context, codes[0][:, None], cache)
        for book in range(1, self.config.audio_num_codebooks):
            if book > 1:
                hidden = self.decoder(self.projection(self.embed_codes(codes[-1][:, None], book - 1)), cache)
            codes.append(choose(book, self.logits(book, hidden[:, -1])))
        return torch.stack(codes, 1)


class RowCache(Cache):
    """The backbone's cache, which knows which rows are padding."""

    def __init__(self) -> None:
        super().__init__()
        self._valid: Tensor | None = None

    def see(self, valid: Bool[Tensor, "B S"]) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B 1 S P"]]:
        """Positions of new rows, and what they attend to: the valid rows up to themselves, and themselves."""
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], 1)
        new, seen = valid.shape[1], self._valid.shape[1]
        ones = torch.ones(new, seen, dtype=torch.bool, device=valid.device)
        itself = ones.triu(seen - new).tril(seen - new)
        mask = (self._valid[:, None] & ones.tril(seen - new)) | itself
        return self._valid.cumsum(1)[:, -new:] - 1, mask[:, None]

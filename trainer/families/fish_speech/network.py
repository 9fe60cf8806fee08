"""The dual autoregressive network: a slow transformer over frames, a fast one over the codes inside a frame.

Legend: ``B`` batch, ``K`` codebooks, ``S`` sequence, ``N`` frames seen by the fast transformer, ``H`` heads, ``D`` and
``F`` widths of the slow and the fast one, ``V`` vocabulary. Row 0 of an input is the token (of text, or the mark of an
audio frame), rows 1 … K are the codes.

Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/models/text2semantic/llama.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.shapes import Bool, Float, Int
from trainer.spec.errors import UtaforgeError

from .objective import loss_sums

Cache = list[tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]]
"""Keys and values of each layer, written at their positions."""
KEPT_IF_NONE = 8
"""Positions that the fast transformer sees when no frame has codes, so that all parameters are used (upstream)."""


@dataclass(frozen=True)
class Blocks:
    """The shape of one of the two transformers.

    Attributes:
        layers: how many.
        width: of the residual stream.
        heads: of the queries.
        groups: heads of keys and values, each shared by ``heads / groups`` query heads.
        head_width: of one head.
        hidden: width of the feed-forward.
    """

    layers: int
    width: int
    heads: int
    groups: int
    head_width: int
    hidden: int


@dataclass(frozen=True)
class Config:
    """The network's configuration, from upstream's ``config.json``.

    Attributes:
        slow: the transformer over frames.
        fast: the transformer over the codes of a frame.
        vocabulary: tokens of row 0.
        codebooks: ``K``.
        codebook_size: entries that the network has for each codebook.
        positions: longest sequence it was made for.
        rope_base: of the rotary positions.
        eps: of the norms.
        dropout: of the attention weights.
        spread: standard deviation of random initial weights.
    """

    slow: Blocks
    fast: Blocks
    vocabulary: int
    codebooks: int
    codebook_size: int
    positions: int
    rope_base: float
    eps: float
    dropout: float
    spread: float

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Config":
        """From upstream's keys; what ``fast_*`` leaves out is as in the slow transformer.

        Raises:
            UtaforgeError: a key is missing, or it describes a network that no 1.4 or 1.5 release has.
        """
        try:
            for name, value in _ALWAYS.items():
                if told.get(name, value) != value:
                    raise UtaforgeError(f"config.json: {name} is {told[name]!r}", "use an official 1.4 or 1.5 release")
            own = {name: told[name] for name in _BLOCKS}
            fast = {name: told[name] if told.get(f"fast_{name}") is None else told[f"fast_{name}"] for name in _BLOCKS}
            return cls(
                slow=_blocks(told["n_layer"], own),
                fast=_blocks(told["n_fast_layer"], fast),
                vocabulary=told["vocab_size"],
                codebooks=told["num_codebooks"],
                codebook_size=told["codebook_size"],
                positions=told["max_seq_len"],
                rope_base=told["rope_base"],
                eps=told["norm_eps"],
                dropout=told["dropout"],
                spread=told["initializer_range"],
            )
        except KeyError as error:
            raise UtaforgeError(f"config.json lacks {error}", "use an official 1.4 or 1.5 release") from None


_ALWAYS = {
    "model_type": "dual_ar",
    "tie_word_embeddings": False,
    "attention_qkv_bias": False,
    "fast_attention_qkv_bias": False,
    "is_reward_model": False,
    "share_codebook_embeddings": True,
    "scale_codebook_embeddings": False,
}
_BLOCKS = ("dim", "n_head", "n_local_heads", "head_dim", "intermediate_size")


def _blocks(layers: int, told: Mapping[str, int]) -> Blocks:
    width, heads, groups, head_width, hidden = (told[name] for name in _BLOCKS)
    return Blocks(layers, width, heads, groups, head_width, hidden)


class FishSpeechNetwork(nn.Module):
    """Slow and fast transformer under upstream's names.

    Args:
        config: its shape.
        semantic: tokens that mark an audio frame: one in 1.4; in 1.5 one for each value of the frame's first code.
    """

    def __init__(self, config: Config, semantic: range) -> None:
        super().__init__()
        self.config, self.semantic = config, semantic
        slow, fast = config.slow, config.fast
        self.embeddings = nn.Embedding(config.vocabulary, slow.width)
        self.codebook_embeddings = nn.Embedding(config.codebooks * config.codebook_size, slow.width)
        self.layers = nn.ModuleList(Layer(slow, config) for _ in range(slow.layers))
        self.norm = nn.RMSNorm(slow.width, config.eps)
        self.output = nn.Linear(slow.width, config.vocabulary, bias=False)
        self.fast_project_in = nn.Identity() if fast.width == slow.width else nn.Linear(slow.width, fast.width)
        self.fast_embeddings = nn.Embedding(config.codebook_size, fast.width)
        self.fast_layers = nn.ModuleList(Layer(fast, config) for _ in range(fast.layers))
        self.fast_norm = nn.RMSNorm(fast.width, config.eps)
        self.fast_output = nn.Linear(fast.width, config.codebook_size, bias=False)
        self._checkpointing = False
        self.apply(self._initialise)

    @property
    def code_in_token(self) -> bool:
        """Whether a frame's token tells its first code (1.5)."""
        return len(self.semantic) > 1

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers' activations in the backward pass."""
        self._checkpointing = True

    def forward(
        self,
        inputs: Int[Tensor, "B 1+K S"],
        labels: Int[Tensor, "B 1+K S"] | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
    ) -> Tensor | tuple[Float[Tensor, "B S V"], Float[Tensor, "B S K V"]]:
        """Sums [2] of both losses if ``labels`` are given, else logits of tokens and of codes.

        Where the next frame has no code other than 0 in its first K - 1 books, the fast transformer is not asked and
        the codes' logits are 0 (upstream).

        Args:
            inputs: tokens and codes.
            labels: of the same shape, -100 where there is none.
            padding: keys that nobody attends to. Padding on the right, without labels, needs no mask: nothing that
                counts attends to it.
        """
        hidden = self.slow(inputs, padding=padding)
        codes = functional.pad(inputs[:, 1:-1, 1:], (0, 1)).mT.flatten(0, 1)
        kept = codes.ne(0).any(1)
        kept[:KEPT_IF_NONE] |= ~kept.any()
        places = kept.nonzero().squeeze(1)
        first = self.fast_project_in(hidden.flatten(0, 1)[places])
        fast = self.fast(torch.cat([first[:, None], self.fast_embeddings(codes[places])], 1))
        if labels is None:
            logits = self.fast_output(fast)
            book_logits = logits.new_zeros(len(codes), *logits.shape[1:]).index_copy(0, places, logits)
            return self.output(self.norm(hidden)), book_logits.unflatten(0, hidden.shape[:2])
        return loss_sums(
            hidden, labels, places, fast, lambda rows: self.output(self.norm(rows)), self.fast_output, self.config
        )

    def slow(
        self,
        inputs: Int[Tensor, "B 1+K S"],
        *,
        padding: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states before the last norm; with a ``cache``, ``inputs`` stand at ``positions`` of it."""
        tokens, codes = inputs[:, 0], inputs[:, 1:]
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.config.codebook_size
        of_codes = self.codebook_embeddings(codes + offsets[:, None]).sum(1)
        audio = (tokens >= self.semantic.start) & (tokens < self.semantic.stop)
        hidden = self.embeddings(tokens) + torch.where(audio[..., None], of_codes, 0)
        return self._run(self.layers, self.config.slow, hidden, padding, positions, cache)

    def fast(
        self,
        states: Float[Tensor, "N k F"],
        *,
        positions: Int[Tensor, "N k"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "N k F"]:
        """Normed hidden states from which ``fast_output`` tells the codes."""
        return self.fast_norm(self._run(self.fast_layers, self.config.fast, states, None, positions, cache))

    def cache(self, blocks: Blocks, batch: int, length: int) -> Cache:
        """An empty cache of ``length`` positions."""
        like = self.norm.weight
        shape = (batch, blocks.groups, length, blocks.head_width)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(blocks.layers)]

    def _run(
        self,
        layers: nn.ModuleList,
        blocks: Blocks,
        states: Tensor,
        padding: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        at = torch.arange(states.shape[1], device=states.device)[None] if positions is None else positions
        mask = None
        if cache is not None:
            mask = at[:, None, :, None] >= torch.arange(cache[0][0].shape[2], device=states.device)
        elif padding is not None:
            mask = (at[:, None, :, None] >= at[:, None, None]) & ~padding[:, None, None]
        turn = rotation(at, blocks.head_width, self.config.rope_base)
        recompute = self._checkpointing and self.training
        for index, layer in enumerate(layers):
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            states = run(states, turn, mask, at, None if cache is None else cache[index])  # type: ignore[assignment]
        return states

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.spread)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward (Touvron et al. 2023, https://arxiv.org/abs/2302.13971)."""

    def __init__(self, blocks: Blocks, config: Config) -> None:
        super().__init__()
        self.attention = Attention(blocks, config.dropout)
        self.feed_forward = FeedForward(blocks)
        self.ffn_norm = nn.RMSNorm(blocks.width, config.eps)
        self.attention_norm = nn.RMSNorm(blocks.width, config.eps)

    def forward(self, states: Float[Tensor, "B S D"], *how: Any) -> Float[Tensor, "B S D"]:
        """``how``: see ``Attention``."""
        states = states + self.attention(self.attention_norm(states), *how)
        return states + self.feed_forward(self.ffn_norm(states))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) with rotary positions."""

    def __init__(self, blocks: Blocks, dropout: float) -> None:
        super().__init__()
        self.blocks, self.dropout = blocks, dropout
        heads = blocks.heads + 2 * blocks.groups
        self.wqkv = nn.Linear(blocks.width, heads * blocks.head_width, bias=False)
        self.wo = nn.Linear(blocks.heads * blocks.head_width, blocks.width, bias=False)

    def forward(
        self,
        states: Float[Tensor, "B S D"],
        turn: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 S keys"] | None,
        positions: Int[Tensor, "B S"],
        cache: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "B S D"]:
        """Causal where there is no ``mask``; a ``cache`` is written at ``positions`` and attended to as a whole."""
        heads, groups = self.blocks.heads, self.blocks.groups
        split = self.wqkv(states).unflatten(-1, (-1, self.blocks.head_width)).transpose(1, 2)
        query, key, value = split.split([heads, groups, groups], 1)
        query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            rows = torch.arange(len(states), device=states.device)[:, None]
            for kept, new in zip(cache, (key, value), strict=True):
                kept.transpose(1, 2)[rows, positions] = new.transpose(1, 2).to(kept.dtype)
            key, value = cache
        key, value = (each.repeat_interleave(heads // groups, 1) for each in (key, value))
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.w1 = nn.Linear(blocks.width, blocks.hidden, bias=False)
        self.w3 = nn.Linear(blocks.width, blocks.hidden, bias=False)
        self.w2 = nn.Linear(blocks.hidden, blocks.width, bias=False)

    def forward(self, states: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Of each position by itself."""
        return self.w2(functional.silu(self.w1(states)) * self.w3(states))


def rotation(positions: Int[Tensor, "B S"], width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, S, width / 2] of the rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    They are rounded to bfloat16 whatever the network's precision: so the weights were trained (llama.py,
    ``precompute_freqs_cis``).
    """
    powers = torch.arange(0, width, 2, device=positions.device).float() / width
    angles = positions[:, None, :, None].float() * (1.0 / base**powers)
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


def rotate(states: Float[Tensor, "B H S D"], turn: tuple[Tensor, Tensor]) -> Float[Tensor, "B H S D"]:
    """Neighbouring pairs of channels turned by their angles."""
    cosine, sine = turn
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return turned.flatten(-2).to(states.dtype)

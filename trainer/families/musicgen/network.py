"""MusicGen's trainable part: transformers' decoder behind the projection of the text.

Legend: ``B`` batch, ``K`` codebooks, ``S`` sequence, ``L`` text tokens, ``D`` width, ``V`` vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from trainer.families.cross_entropy import labelled
from trainer.shapes import Bool, Float, Int

from .objective import cross_entropy_sums


class MusicGenNetwork(nn.Module):
    """Decoder and text projection, under the names of ``MusicgenForConditionalGeneration``.

    The text encoder and EnCodec are no part of it: shards hold the codes and the encoder's hidden states.

    Args:
        config: the decoder's configuration.
        text_width: width of the text encoder's hidden states.
    """

    def __init__(self, config: MusicgenDecoderConfig, text_width: int) -> None:
        super().__init__()
        self.decoder = MusicgenForCausalLM(config)
        self.enc_to_dec_proj = nn.Linear(text_width, config.hidden_size)

    @property
    def config(self) -> MusicgenDecoderConfig:
        """The decoder's configuration."""
        return self.decoder.config

    @property
    def pad(self) -> int:
        """The input id where a codebook has no code: one past the vocabulary."""
        return self.config.vocab_size

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers' activations in the backward pass."""
        self.decoder.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        ids: Int[Tensor, "B K S"],
        text_hidden: Float[Tensor, "B L text_width"],
        text_mask: Bool[Tensor, "B L"],
        labels: Int[Tensor, "B K S"] | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Loss sums [K] if ``labels`` are given, else logits [B, K, S, V].

        A row without any text is unconditional. With a ``cache``, ``ids`` continue what the cache holds.
        """
        # Finding labels waits for the GPU: before the decoder, not between it and what follows.
        books = None if labels is None else [labelled(book) for book in labels.unbind(1)]
        projection = self.enc_to_dec_proj
        text = projection(text_hidden.to(projection.weight.dtype)) * text_mask[..., None]
        # Keys and values of a zero row are zero (no biases), so that attending to all of it is attending to nothing,
        # without the softmax over an empty set.
        attended = text_mask | ~text_mask.any(1, keepdim=True)
        hidden = self.decoder.model(
            ids.flatten(0, 1),
            encoder_hidden_states=text,
            encoder_attention_mask=attended.long(),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        heads = self.decoder.lm_heads
        if books is not None:
            return cross_entropy_sums(hidden, books, heads, self.config.vocab_size)
        return torch.stack([head(hidden) for head in heads], dim=1)

"""SongBloom's network: sketch tokens are planned one by one, each block of them is rendered to latents.

Legend: ``B`` batch, ``T`` frames, ``n`` blocks of a song, ``N`` valid blocks of a batch, ``P`` frames of a block, ``C``
latent channels, ``L`` prefix, ``D`` width, ``V`` sketch ids and the end. Everything is computed inside ``forward``,
where autocast, DDP and DeepSpeed hook in.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.shapes import Bool, Float, Int

from .config import SongBloomConfig
from .objective import Draws, cross_entropy_sum, flow_pairs, labels_of, valid_blocks
from .text import NO_TOKEN
from .transformer import Cache, FlowTransformer, Llama


class Plan(NamedTuple):
    """What the planner says of a batch.

    Attributes:
        states: of the positions that predict a sketch id: of frame 0 … T-1 and of the end.
        h: of each block, after its last sketch id.
    """

    states: Float[Tensor, "B T+1 D"]
    h: Float[Tensor, "B n D"]


class SongBloom(nn.Module):
    """Planner and renderer, under upstream's state-dict names."""

    def __init__(self, config: SongBloomConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.condition_provider = Conditions(config)
        self.bos_token = nn.Parameter(torch.randn(dim) * config.init_std)
        self.skeleton_emb = nn.Embedding(config.pitches + 2, dim)
        self.ar_transformer = Llama(dim, config.heads, config.ffn, config.plan_layers, config.rotary_base)
        self.skeleton_classifier = nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.SiLU(), nn.Linear(dim, config.pitches + 1)
        )
        self.block_conv = nn.Sequential(
            nn.Flatten(-2), nn.Linear(config.block * config.latent_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.project_in, self.project_out = nn.Linear(config.latent_dim, dim), nn.Linear(dim, config.latent_dim)
        self.timestep_features = FourierFeatures(config.time_features)
        self.to_timestep_embed = nn.Sequential(
            nn.Linear(config.time_features, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.nar_dit = FlowTransformer(dim, config.heads, config.ffn, config.flow_layers)
        for module in self.modules():
            _initialise(module, config.init_std)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers' activations in the backward pass."""
        self.ar_transformer.checkpointing = self.nar_dit.checkpointing = True

    def forward(self, part: str, *inputs: Any) -> Any:
        """One of ``losses``, ``start``, ``next_token``, ``next_block`` and ``velocity``, by name."""
        return getattr(self, part)(*inputs)

    def losses(
        self,
        lyrics: Int[Tensor, "B 3 tokens"],
        prompt: Float[Tensor, "B frames C"],
        sketch: Int[Tensor, "B T"],
        latents: Float[Tensor, "B C T"],
        length: Int[Tensor, " B"],
        ends: Bool[Tensor, " B"],
        draws: Draws,
    ) -> Float[Tensor, "2"]:
        """Summed cross entropy of the sketch and summed squared error of the flow.

        Args:
            lyrics: token, structure and sentence; ``NO_TOKEN`` where there is none.
            prompt: latents of the style, zeros where there is none.
            sketch: ids; what stands beyond a row's length does not matter.
            latents: of the same frames.
            length: frames of each row, whole blocks.
            ends: rows whose song is over then; the others were cut.
            draws: of the flow, for each valid block.
        """
        plan = self.plan(self.condition_provider(lyrics, prompt), sketch, latents)
        labels = labels_of(sketch, length, ends, self.config.eos)
        entropy = cross_entropy_sum(plan.states, labels, self.skeleton_classifier, self.config.pitches + 1)
        valid = valid_blocks(length, plan.h.shape[1], self.config.block)
        flow = flow_pairs(latents, valid, draws.t, draws.noise)
        sketches = sketch.unflatten(1, (-1, self.config.block))[valid]
        kept = (draws.keep_h, draws.keep_sketch)
        predicted = self.velocity(plan.h[valid], sketches, flow.previous, flow.noised, draws.t, *kept)
        error = functional.mse_loss(predicted.float(), flow.target, reduction="sum")
        return torch.stack([entropy, error])

    def plan(self, prefix: Float[Tensor, "B L D"], sketch: Int[Tensor, "B T"], latents: Float[Tensor, "B C T"]) -> Plan:
        """Read ``prefix``, the beginning, and of each block its sketch and then its latents as one token."""
        size = self.config.block
        ids = self.skeleton_emb(sketch).unflatten(1, (-1, size))
        heard = self.block_conv(latents.transpose(1, 2).unflatten(1, (-1, size)))
        blocks = torch.cat([ids, heard[:, :, None].to(ids.dtype)], dim=2)
        states = self.ar_transformer(self._stream(prefix, self._begin(len(prefix)), blocks.flatten(1, 2)))
        first, states = states[:, prefix.shape[1] :].split([1, states.shape[1] - prefix.shape[1] - 1], dim=1)
        states = states.unflatten(1, (-1, size + 1))
        predicting = torch.cat([states[:, :, : size - 1], states[:, :, size:]], dim=2)
        return Plan(torch.cat([first, predicting.flatten(1, 2)], dim=1), states[:, :, size - 1])

    def velocity(
        self,
        h: Float[Tensor, "N D"],
        sketch: Int[Tensor, "N P"],
        previous: Float[Tensor, "N P C"],
        noised: Float[Tensor, "N P C"],
        t: Float[Tensor, " N"],
        keep_h: Bool[Tensor, " N"],
        keep_sketch: Bool[Tensor, " N"],
    ) -> Float[Tensor, "N P C"]:
        """The flow of each block at time ``t``, from noise minus latents; a block may go without ``h`` or sketch."""
        x = self._stream(
            self.to_timestep_embed(self.timestep_features(t))[:, None],
            (h * keep_h[:, None])[:, None],
            self.skeleton_emb(sketch) * keep_sketch[:, None, None],
            self.project_in(previous),
            self.project_in(noised),
        )
        return self.project_out(self.nar_dit(x)[:, -noised.shape[1] :])

    def start(
        self, lyrics: Int[Tensor, "B 3 tokens"], prompt: Float[Tensor, "B frames C"], cache: Cache
    ) -> Float[Tensor, "B V"]:
        """Logits of the first sketch id."""
        prefix = self.condition_provider(lyrics, prompt)
        return self._logits(self.ar_transformer(self._stream(prefix, self._begin(len(prefix))), cache))

    def next_token(self, sketch: Int[Tensor, " B"], cache: Cache) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B D"]]:
        """Logits of the id after ``sketch``, and the state that is a block's ``h`` if ``sketch`` is its last id."""
        states = self.ar_transformer(self._stream(self.skeleton_emb(sketch[:, None])), cache)
        return self._logits(states), states[:, -1]

    def next_block(self, latents: Float[Tensor, "B P C"], cache: Cache) -> Float[Tensor, "B V"]:
        """Logits of the first sketch id after a block that was rendered to ``latents``."""
        return self._logits(self.ar_transformer(self._stream(self.block_conv(latents)[:, None]), cache))

    def _begin(self, songs: int) -> Float[Tensor, "B 1 D"]:
        return self.bos_token.expand(songs, 1, -1)

    def _stream(self, *parts: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """One sequence, in the precision that embeddings are kept in; fp16 has not the range for sums over layers."""
        kept = self.skeleton_emb.weight.dtype
        return torch.cat([part.to(torch.float32 if kept == torch.float16 else kept) for part in parts], dim=1)

    def _logits(self, states: Float[Tensor, "B S D"]) -> Float[Tensor, "B V"]:
        return self.skeleton_classifier(states[:, -1]).float()


class Conditions(nn.Module):
    """Style and lyrics as what stands before the song; no mask, whatever is not there is zero."""

    def __init__(self, config: SongBloomConfig) -> None:
        super().__init__()
        self.conditioners = nn.ModuleDict({"lyrics": Lyrics(config), "prompt_wav": Style(config)})

    def forward(self, lyrics: Int[Tensor, "B 3 tokens"], prompt: Float[Tensor, "B frames C"]) -> Float[Tensor, "B L D"]:
        """Style first, then lyrics."""
        style, words = self.conditioners["prompt_wav"](prompt), self.conditioners["lyrics"](lyrics)
        return torch.cat([style, words.to(style.dtype)], dim=1)


class Lyrics(nn.Module):
    """Sum of three embeddings a position; tokens and structures share a table."""

    def __init__(self, config: SongBloomConfig) -> None:
        super().__init__()
        self.length = config.lyric_length
        self.output_proj = nn.Embedding(len(config.tokens), config.dim, padding_idx=0)
        self.sentence_idx_in_structure_emb = nn.Embedding(config.sentences, config.dim, padding_idx=0)
        self.blank_emb = nn.Parameter(torch.zeros(1, config.dim), requires_grad=False)

    def forward(self, lyrics: Int[Tensor, "B 3 tokens"]) -> Float[Tensor, "B length D"]:
        """Cut or filled up with ``blank_emb``."""
        lyrics = functional.pad(lyrics, (0, self.length - lyrics.shape[-1]), value=NO_TOKEN)
        tokens, structures, sentences = lyrics.clamp(min=0).unbind(1)
        words = self.output_proj(tokens) + self.output_proj(structures) + self.sentence_idx_in_structure_emb(sentences)
        return torch.where((lyrics[:, 0] == NO_TOKEN)[..., None], self.blank_emb.to(words.dtype), words)


class Style(nn.Module):
    """Latents of the style, each one a position."""

    def __init__(self, config: SongBloomConfig) -> None:
        super().__init__()
        self.length = config.prompt_length
        self.output_proj = nn.Linear(config.latent_dim, config.dim, bias=False)

    def forward(self, prompt: Float[Tensor, "B frames C"]) -> Float[Tensor, "B length D"]:
        """Cut or filled up with zeros."""
        return self.output_proj(functional.pad(prompt, (0, 0, 0, self.length - prompt.shape[1])))


class FourierFeatures(nn.Module):
    """Cosines and sines of a time in learned frequencies (https://arxiv.org/abs/2006.10739)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features // 2, 1))

    def forward(self, t: Float[Tensor, " N"]) -> Float[Tensor, "N features"]:
        """In fp32."""
        angles = 2 * math.pi * t.float()[:, None] * self.weight.float()[:, 0]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])

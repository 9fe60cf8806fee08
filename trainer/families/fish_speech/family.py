"""The fish-speech family: what the trainer sees of it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.families import made_up
from trainer.families.base import Arrays, Autoregressive, Batch, Example, Predictions, unwrapped
from trainer.families.cross_entropy import NO_LABEL
from trainer.families.fish_speech.spec import SPEC, FishSpeech
from trainer.families.sampling import draw_table
from trainer.spec.errors import DataError
from trainer.spec.job import Prompt, Sampling
from trainer.weights import beside, configuration, local_path

from .adapter import export_adapter
from .generate import Sampler, generate
from .network import FishSpeechNetwork
from .objective import Reference, example, prompt
from .text import Tokenizer
from .weights import TOKENIZERS, Release, load_network, open_release, save_network

if TYPE_CHECKING:
    from trainer.codecs.firefly import FireflyCodec

CODES = 1000
"""Of the codec, in each codebook; the network has room for 1,024."""


class FishSpeechFamily(Autoregressive):
    """fish-speech 1.4 or 1.5, configured by a job's ``model:`` section.

    ``base`` is the cross entropy of the tokens, ``semantic`` that of the codes; they count alike, as upstream.
    """

    terms: Mapping[str, float] = {"base": 1.0, "semantic": 1.0}
    frame_rate = SPEC.frame_rate
    vocabulary = CODES

    def __init__(self, model: FishSpeech) -> None:
        self.model = model
        self.segment_seconds = model.segment_seconds

    @cached_property
    def codebooks(self) -> int:
        """Of the network's configuration."""
        return self.release.config.codebooks

    @classmethod
    def told_by(cls, url: str) -> dict[str, str] | None:
        """The version, known by the tokenizer's file."""
        if configuration(url).get("model_type") != "dual_ar":
            return None
        versions = [version for version, name in TOKENIZERS.items() if beside(url, name)]
        return {"version": versions[-1]} if versions else {}

    def network(self) -> FishSpeechNetwork:
        """The network with the weights of ``model.pretrained``, on the CPU in fp32."""
        return load_network(self.release, self.tokenizer.semantic)

    def save(self, network: nn.Module, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the network in the format of the official release."""
        save_network(self.release, unwrapped(network, FishSpeechNetwork), folder, values)

    def export_adapter(self, folder: Path, to: Path) -> None:
        """Write ``lora.ckpt`` and its settings, see ``adapter.export_adapter``."""
        with torch.device("meta"):
            shapes = FishSpeechNetwork(self.release.config, self.tokenizer.semantic)
        export_adapter(folder, to, shapes)

    def conditions(self, texts: Sequence[Mapping[str, str]]) -> list[dict[str, np.ndarray]]:
        """Nothing: the network reads the text itself."""
        return [{} for _ in texts]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """``inputs`` and ``labels`` [B, 1+K, S], padded on the right; nothing is dropped, ``training`` or not.

        Lyrics are what is spoken or sung. In 1.4 the tags are the speaker's name.

        Raises:
            DataError: a song is longer than the network has positions.
        """
        pairs = []
        for song in examples:
            codes = torch.from_numpy(song.arrays["codes"].astype(np.int64))
            lyrics, tags = song.text.get("lyrics", ""), song.text.get("tags", "")
            pair = example(self.tokenizer, lyrics, tags, codes, ends=song.ends)
            self._check_length(pair[0].shape[1], f"song {song.id}")
            pairs.append(pair)
        longest = max(inputs.shape[1] for inputs, _ in pairs)
        inputs = torch.stack([functional.pad(each, (0, longest - each.shape[1])) for each, _ in pairs])
        labels = torch.stack([functional.pad(each, (0, longest - each.shape[1]), value=NO_LABEL) for _, each in pairs])
        counts = {
            "base": float(labels[:, 0].ne(NO_LABEL).sum()),
            "semantic": float(labels[:, 1:].ne(NO_LABEL).sum()),
        }
        frames = sum(song.arrays["codes"].shape[-1] for song in examples)
        return Batch({"inputs": inputs, "labels": labels}, counts, frames)

    def made_up(self, frames: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """``codes``."""
        return {"codes": made_up.codes(self, frames, draw)}

    def sums(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Summed cross entropies, see ``objective.loss_sums``."""
        base, semantic = network(batch.tensors["inputs"], batch.tensors["labels"])
        return {"base": base, "semantic": semantic}

    def generate(self, network: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays]:
        """``codes`` [8, T] of the prompts' lyrics, at most as long as asked for: a song ends where the network ends it.

        The voice is that of a prompt's ``style``, which says ``style_text``, if it has one.

        Raises:
            DataError: a prompt is longer than the network has positions, or names a speaker to 1.5, or has a style that
                cannot be heard or whose words are not told.
            UtaforgeError: a style is given, but no codec to read it with.
        """
        frames = [max(round(each.seconds * self.frame_rate), 1) for each in prompts]
        given = [self._prompt(index, each) for index, each in enumerate(prompts, 1)]
        for index, (before, count) in enumerate(zip(given, frames, strict=True), 1):
            self._check_length(before.shape[1] + count, f"prompt {index}")
        draws = draw_table(frames, [each.seed for each in prompts], 1 + self.codebooks)
        sampler = Sampler(**sampling.given)
        songs = generate(network, given, frames, draws, sampler, self.tokenizer.end)
        return [{"codes": self._codes(song)} for song in songs]

    def greedy(self, network: nn.Module, example: Example, frames: int) -> Batch:
        """``inputs`` and ``labels`` as ``collate`` has them, with what the network has made, be it audio or not.

        Codes that were not chosen have no label: the first one in 1.5, and all where the fast network was not asked.
        """
        text, tags = example.text.get("lyrics", ""), example.text.get("tags", "")
        before = prompt(self.tokenizer, text, tags, self.codebooks)
        draws = torch.zeros(1, frames, 1 + self.codebooks)
        sampler = Sampler(temperature=1.0, top_p=1.0, top_k=1, repetition_penalty=1.0)
        (made,) = generate(network, [before], [frames], draws, sampler, self.tokenizer.end)
        made = made.cpu()
        labels = made.masked_fill(~made[1:-1].any(0) & (torch.arange(len(made)) > 0)[:, None], NO_LABEL)
        if unwrapped(network, FishSpeechNetwork).code_in_token:
            labels[1] = NO_LABEL
        labels = functional.pad(labels, (before.shape[1] - 1, 1), value=NO_LABEL)
        return Batch({"inputs": torch.cat([before, made], 1)[None], "labels": labels[None]}, {}, made.shape[1])

    def predictions(self, network: nn.Module, batch: Batch) -> list[Predictions]:
        """A token sees the frames before its own; codes also see their own, of which they are a part."""
        inputs, labels = batch.tensors["inputs"], batch.tensors["labels"]
        of_tokens, of_codes = network(inputs)
        semantic = self.tokenizer.semantic
        frames = ((inputs[:, 0] >= semantic.start) & (inputs[:, 0] < semantic.stop)).cumsum(1)
        found = []
        for logits, ids, seen in (
            (of_tokens, labels[:, 0], frames),
            (of_codes, labels[:, 1:].mT, (frames + 1)[..., None]),
        ):
            there = ids != NO_LABEL
            found.append(Predictions(logits[there], ids[there], seen.expand_as(ids)[there]))
        return found

    @cached_property
    def release(self) -> Release:
        """Where the weights are, and their shape."""
        return open_release(self.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the release."""
        return self.release.tokenizer()

    def _prompt(self, index: int, asked: Prompt) -> Tensor:
        if asked.speaker and self.model.version == "1.5":
            raise DataError(f"prompt {index} names a speaker, whom fish-speech 1.5 has no place for", "remove it")
        return prompt(self.tokenizer, asked.lyrics, asked.speaker or "", self.codebooks, self._reference(index, asked))

    def _reference(self, index: int, asked: Prompt) -> Reference | None:
        if bool(asked.style) != bool(asked.style_text):
            raise DataError(
                f"prompt {index} has only one of style and style_text",
                "name a recording in style and write what is said in it in style_text, or leave out both",
            )
        if not asked.style:
            return None
        from trainer.audio.decode import load

        file = local_path(asked.style, "validation.prompts.style")
        codes = self._codec.encode(load(file, self._codec.sample_rate, self._codec.channels))["codes"]
        return Reference(asked.style_text or "", torch.from_numpy(codes.astype(np.int64)))

    @cached_property
    def _codec(self) -> "FireflyCodec":
        from trainer.codecs.firefly import FireflyCodec

        return FireflyCodec.open(self.model)

    def _codes(self, song: Tensor) -> np.ndarray:
        """Codes of the frames that are audio, as the codec has them; there is always at least one."""
        semantic = self.tokenizer.semantic
        audio = (song[0] >= semantic.start) & (song[0] < semantic.stop)
        audio[0] |= ~audio.any()
        return (song[1:, audio] - self.tokenizer.shift).clamp(0, CODES - 1).cpu().numpy().astype(np.uint16)

    def _check_length(self, positions: int, whose: str) -> None:
        most = self.release.config.positions
        if positions > most:
            raise DataError(
                f"{whose} needs {positions} positions, the network has {most}: a text takes some, a second takes 21.5",
                "ask for less (model.segment_seconds, validation.prompts.seconds, a shorter validation.prompts.style)",
            )

"""Text encoders: T5 of a release, and a hashed stand-in for networks that ship or are made up here."""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float

from trainer.spec.errors import UtaforgeError
from trainer.weights import local_path, tensors

from .weights import Release

if TYPE_CHECKING:
    from transformers import T5EncoderModel

MAX_TOKENS = 512
HASHED_TOKENS = 32
TIED = {"shared.weight", "encoder.embed_tokens.weight"}
"""T5 has one embedding under two names; a file may hold either or both."""


class TextEncoder(Protocol):
    """Texts → hidden states of a frozen encoder."""

    def __call__(self, texts: Sequence[str]) -> list[Float[np.ndarray, "L text_width"]]:
        """Float16 hidden states of each text, unpadded."""
        ...


def open_text_encoder(release: Release, override: str | None) -> TextEncoder:
    """The encoder of ``release``, or the T5 at URL ``override``; weights are loaded when first used."""
    if override is not None:
        return T5Text(local_path(override, "model.text_encoder"), release.text_width)
    if release.folder is None or release.config["text_encoder"].get("model_type") == "hashed":
        return HashedText(release.text_width)
    return T5Text(release.folder, release.text_width)


class HashedText:
    """Each word is a fixed random vector drawn from its own hash; nothing is learned.

    Runs of letters beyond ASCII (Japanese is written without spaces) are taken as overlapping pairs of characters. At
    most ``HASHED_TOKENS`` words count.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, texts: Sequence[str]) -> list[Float[np.ndarray, "L text_width"]]:
        """One standard normal vector per word, float16; no words, no rows."""
        return [
            np.array([self._vector(word) for word in words(text)[:HASHED_TOKENS]], np.float16).reshape(-1, self.width)
            for text in texts
        ]

    def _vector(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return np.random.Generator(np.random.PCG64(seed)).standard_normal(self.width, np.float32)


def words(text: str) -> list[str]:
    """Lower-case ASCII words, and pairs of neighbouring characters of all other letters.

    >>> words("Fast, 祭り囃子")
    ['fast', '祭り', 'り囃', '囃子']
    """
    found: list[str] = []
    for run in re.findall(r"[a-z0-9]+|[^\W\x00-\x7f]+", text.lower()):
        pairs = [run[i : i + 2] for i in range(max(len(run) - 1, 1))]
        found.extend([run] if run.isascii() else pairs)
    return found


class T5Text:
    """T5's encoder, frozen, fp32, on the CPU.

    Args:
        folder: a MusicGen release (its ``text_encoder.*`` tensors) or a T5 of its own, with tokenizer files.
        width: the width that the network expects.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Float[np.ndarray, "L text_width"]]:
        """Last hidden states, float16. Texts run one by one, so that none depends on another's padding."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return self._model(input_ids=ids).last_hidden_state[0].numpy().astype(np.float16)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UtaforgeError(
                f"{self.folder} holds no tokenizer that can be read: {error}",
                "copy tokenizer.json and tokenizer_config.json of the release beside its weights",
            ) from error

    @cached_property
    def _model(self) -> "T5EncoderModel":
        from transformers import T5Config, T5EncoderModel

        config = T5Config.from_pretrained(self.folder)
        inside = "text_encoder" in (raw := T5Config.get_config_dict(self.folder)[0])
        if inside:
            config = T5Config(**raw["text_encoder"])
        if config.d_model != self.width:
            raise UtaforgeError(
                f"the text encoder at {self.folder} is {config.d_model} wide, the network expects {self.width}",
                "set model.text_encoder to the T5 that the network was trained with",
            )
        prefix = "text_encoder." if inside else ""
        state = {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in tensors(self.folder)
            if name.startswith(prefix) and not name.startswith(("decoder.", "lm_head."))
        }
        model = T5EncoderModel(config).eval().requires_grad_(False)
        missing, unexpected = model.load_state_dict(state, strict=False)
        absent = set(missing) - (TIED if TIED & state.keys() else set())
        if absent or unexpected:
            raise UtaforgeError(
                f"the text encoder at {self.folder} lacks {sorted(absent)} and has unexpected {sorted(unexpected)}",
                "copy the whole release",
            )
        return model

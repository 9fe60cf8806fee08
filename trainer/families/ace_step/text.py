"""Tags → hidden states: UMT5, and a hashed stand-in for random weights.

UMT5 (Chung et al. 2023, https://arxiv.org/abs/2304.09151) as ``transformers`` has it. Its dim side, for guidance:
ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``pipeline_ace_step.py``.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float

from trainer.spec.errors import UtaforgeError
from trainer.weights import load, local_path, tensors

from .generate import Sampler, weakened
from .weights import PART, Release

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

PART_OF_TEXT = "umt5-base"
MAX_TOKENS = 256
HASHED_TOKENS = 32
WEAK_LAYERS = (8, 10)
"""First and last + 1 of the layers whose queries are weakened for the dim side."""
TIED = ("shared.weight", "encoder.embed_tokens.weight")
"""UMT5 has one embedding under two names; a file may hold either or both."""


class TextEncoder(Protocol):
    """Texts → hidden states of a frozen encoder."""

    def __call__(self, texts: Sequence[str], *, dim: bool = False) -> list[Float[np.ndarray, "L text_width"]]:
        """Float16 hidden states of each text, unpadded; with ``dim`` as guidance is to lead away from."""
        ...


def open_text_encoder(release: Release, override: str | None) -> TextEncoder:
    """The encoder at URL ``override``, else the one in the release; weights are loaded when first used.

    Raises:
        UtaforgeError: there is none.
    """
    width = release.config.text_embedding_dim
    if override is not None:
        return Umt5Text(local_path(override, "model.text_encoder"), width)
    if release.weights is None or release.hashed:
        return HashedText(width)
    folder = release.weights.parent
    beside = (folder.parent if folder.name == PART else folder) / PART_OF_TEXT
    if not beside.is_dir():
        raise UtaforgeError(
            f"{release.url} has no folder {PART_OF_TEXT}, and model.text_encoder is not given",
            f"set model.text_encoder to the release's folder {PART_OF_TEXT}",
        )
    return Umt5Text(beside, width)


class HashedText:
    """Each character is a fixed random vector drawn from its own hash; at most ``HASHED_TOKENS`` count."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, texts: Sequence[str], *, dim: bool = False) -> list[Float[np.ndarray, "L text_width"]]:
        """Standard normal vectors, float16; zeros on the dim side."""
        return [self._vectors("".join(text.split())[:HASHED_TOKENS]) * np.float16(not dim) for text in texts]

    def _vectors(self, characters: str) -> np.ndarray:
        seeds = (hashlib.sha256(character.encode()).digest()[:8] for character in characters)
        dice = (np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big"))) for seed in seeds)
        return np.array([die.standard_normal(self.width) for die in dice], np.float16).reshape(-1, self.width)


class Umt5Text:
    """UMT5's encoder, frozen, fp32, on the CPU.

    Args:
        folder: its weights, configuration and tokenizer.
        width: the width that the network expects.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width

    def __call__(self, texts: Sequence[str], *, dim: bool = False) -> list[Float[np.ndarray, "L text_width"]]:
        """Last hidden states, float16. Texts run one by one, so that none depends on another's padding."""
        layers = self._query_layers() if dim else ()
        with torch.no_grad(), weakened(layers, Sampler.tau):
            return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return self._model(input_ids=ids).last_hidden_state[0].numpy().astype(np.float16)

    def _query_layers(self) -> Iterable[torch.nn.Module]:
        blocks = self._model.encoder.block[slice(*WEAK_LAYERS)]
        return [block.get_submodule("layer.0.SelfAttention.q") for block in blocks]

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
    def _model(self) -> "UMT5EncoderModel":
        from transformers import UMT5Config, UMT5EncoderModel

        config = UMT5Config.from_pretrained(self.folder)
        if config.d_model != self.width:
            raise UtaforgeError(
                f"the text encoder at {self.folder} is {config.d_model} wide, the network expects {self.width}",
                "set model.text_encoder to the UMT5 that the network was trained with",
            )
        state = {name: value for name, value in tensors(self.folder) if not name.startswith(("decoder.", "lm_head."))}
        state |= {name: state[other] for name, other in (TIED, TIED[::-1]) if other in state}
        return load(lambda: UMT5EncoderModel(config), state.items(), str(self.folder)).eval().requires_grad_(False)

"""Frozen text encoders: T5 or UMT5 as ``transformers`` has them, and a hashed stand-in for networks made up here.

Raffel et al. 2019, https://arxiv.org/abs/1910.10683; Chung et al. 2023, https://arxiv.org/abs/2304.09151.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from trainer.shapes import Float
from trainer.spec.errors import UtaforgeError
from trainer.weights import folder_of, load, read_json, tensors

if TYPE_CHECKING:
    from transformers import T5EncoderModel, UMT5EncoderModel

HASHED_TOKENS = 32
INSIDE = "text_encoder"
"""Section of a release's configuration, and beginning of its keys, where the encoder is a part of the release."""
DECODER = ("decoder.", "lm_head.")
TIED = ("shared.weight", "encoder.embed_tokens.weight")
"""One embedding under two names; a file may hold either or both."""


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
    """The encoder of a T5 or UMT5, frozen, fp32, on the CPU; loaded when first used.

    Args:
        path: the folder of its weights, configuration and tokenizer, or its file in there; or those of a release that
            it is a part of.
        kind: which of the two.
        width: the width that the network expects.
        most: tokens of a text that are read; all if not given.
    """

    def __init__(self, path: Path, kind: Literal["t5", "umt5"], width: int, most: int | None = None) -> None:
        self.path, self.kind, self.width, self.most = path, kind, width, most
        self.folder = folder_of(path)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Float[np.ndarray, "L text_width"]]:
        """Last hidden states, float16. Texts run one by one, so that none depends on another's padding."""
        return [self._encode(text) for text in texts]

    @cached_property
    def model(self) -> "T5EncoderModel | UMT5EncoderModel":
        """The network.

        Raises:
            UtaforgeError: it is of another kind or width, or its weights are not whole.
        """
        from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

        told = read_json(self.folder / "config.json")
        prefix = f"{INSIDE}." if INSIDE in told else ""
        told = told.get(INSIDE, told)
        if (told.get("model_type"), told.get("d_model")) != (self.kind, self.width):
            raise UtaforgeError(
                f"the text encoder at {self.folder} is a {told.get('model_type')}, {told.get('d_model')} wide; the "
                f"network expects a {self.kind}, {self.width} wide",
                "set model.text_encoder to the one that the network was trained with",
            )

        def wanted(name: str) -> bool:
            return name.startswith(prefix) and not name.removeprefix(prefix).startswith(DECODER)

        state = {name.removeprefix(prefix): value.float() for name, value in tensors(self.path, wanted)}
        state |= {name: state[other] for name, other in (TIED, TIED[::-1]) if other in state}

        def make() -> T5EncoderModel | UMT5EncoderModel:
            return T5EncoderModel(T5Config(**told)) if self.kind == "t5" else UMT5EncoderModel(UMT5Config(**told))

        return load(make, state.items(), str(self.folder)).eval().requires_grad_(False)

    def _encode(self, text: str) -> np.ndarray:
        cut = {"truncation": self.most is not None, "max_length": self.most}
        ids = self._tokenizer(text, return_tensors="pt", **cut)["input_ids"]
        return self.model(input_ids=ids).last_hidden_state[0].numpy().astype(np.float16)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            if not (self.folder / "tokenizer.json").exists():  # of nothing, transformers makes an empty T5 tokenizer
                raise FileNotFoundError("there is no tokenizer.json")
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UtaforgeError(
                f"{self.folder} holds no tokenizer that can be read: {error}",
                "copy tokenizer.json and tokenizer_config.json of the release beside its weights",
            ) from error


TextEncoder = HashedText | T5Text
"""Texts → hidden states."""

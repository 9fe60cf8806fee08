"""Tags → hidden states, and how guidance sees them dimly.

ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``pipeline_ace_step.py``.
"""

from collections.abc import Sequence

import numpy as np

from trainer.families.text_encoder import HashedText, T5Text, TextEncoder
from trainer.shapes import Float
from trainer.spec.errors import UtaforgeError
from trainer.weights import find, local_path

from .generate import Sampler, weakened
from .weights import PART, Release

PART_OF_TEXT = "umt5-base"
MAX_TOKENS = 256
WEAK_LAYERS = (8, 10)
"""First and last + 1 of the layers whose queries are weakened for the dim side."""


def open_text_encoder(release: Release, override: str | None) -> TextEncoder:
    """The UMT5 at URL ``override``, else the one in the release; weights are loaded when first used.

    Raises:
        UtaforgeError: there is none.
    """
    width = release.config.text_embedding_dim
    if override is not None:
        return T5Text(local_path(override, "model.text_encoder"), "umt5", width, MAX_TOKENS)
    if release.weights is None or release.hashed:
        return HashedText(width)
    top = release.url.rstrip("/").removesuffix(f"/{release.weights.name}").removesuffix(f"/{PART}")
    encoder = find(f"{top}/{PART_OF_TEXT}")
    if encoder is None:
        raise UtaforgeError(
            f"{release.url} has no folder {PART_OF_TEXT}, and model.text_encoder is not given",
            f"set model.text_encoder to the release's folder {PART_OF_TEXT}",
        )
    return T5Text(encoder, "umt5", width, MAX_TOKENS)


def dimmed(text: TextEncoder, tags: Sequence[str]) -> list[Float[np.ndarray, "L text_width"]]:
    """Hidden states that guidance is to lead away from: of a weakened UMT5, zeros of hashed text."""
    if isinstance(text, HashedText):
        return [np.zeros_like(hidden) for hidden in text(tags)]
    blocks = text.model.encoder.block[slice(*WEAK_LAYERS)]
    with weakened((block.get_submodule("layer.0.SelfAttention.q") for block in blocks), Sampler.tau):
        return text(tags)

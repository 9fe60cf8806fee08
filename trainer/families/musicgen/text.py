"""The text encoder of a release."""

from trainer.families.text_encoder import HashedText, T5Text, TextEncoder
from trainer.weights import local_path

from .weights import Release


def open_text_encoder(release: Release, override: str | None) -> TextEncoder:
    """The encoder of ``release``, or the T5 at URL ``override``; weights are loaded when first used.

    It reads descriptions of any length and cuts none.
    """
    if override is not None:
        return T5Text(local_path(override, "model.text_encoder"), "t5", release.text_width)
    if release.path is None or release.config["text_encoder"].get("model_type") == "hashed":
        return HashedText(release.text_width)
    return T5Text(release.path, "t5", release.text_width)

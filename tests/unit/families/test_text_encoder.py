"""Frozen text encoders: what is hashed, and which files are refused. Their numbers are in the families' own tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from trainer.families.text_encoder import HashedText, T5Text, words
from trainer.spec.errors import UtaforgeError


def test_words_of_japanese_are_pairs_of_characters() -> None:
    assert words("Fast, 祭り囃子！ 歌 lo-fi") == ["fast", "祭り", "り囃", "囃子", "歌", "lo", "fi"]


def test_hashed_text_is_the_same_for_ever_and_bounded() -> None:
    encode = HashedText(64)
    (first, empty, long) = encode(["祭り", "", "la " * 99])
    assert first.shape == (1, 64)
    assert first.dtype == np.float16
    assert np.allclose(first[0, :3], (-0.3547, 0.3792, 1.164), atol=1e-3)
    assert empty.shape == (0, 64)
    assert long.shape == (32, 64)


def test_an_encoder_of_another_kind_or_width_or_with_other_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "言葉"
    config = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    read = T5Text(folder, "t5", 16, most=4)
    assert read.model(input_ids=torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 16)
    for kind, width in (("umt5", 16), ("t5", 24)):
        with pytest.raises(UtaforgeError, match=f"is a t5, 16 wide; the network expects a {kind}, {width} wide"):
            _ = T5Text(folder, kind, width, most=4).model  # type: ignore[arg-type]
    state = load_file(folder / "model.safetensors")
    state["encoder.余り"] = state.pop("encoder.final_layer_norm.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UtaforgeError, match=r"missing: encoder.final_layer_norm.weight\n  unexpected: encoder.余り"):
        _ = T5Text(folder, "t5", 16, most=4).model
    with pytest.raises(UtaforgeError, match="holds no tokenizer that can be read"):
        read(["歌"])

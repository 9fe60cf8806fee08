"""MusicGen's weights are read from releases as transformers writes them, strictly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from tests.unit.families.conftest import word_tokenizer
from trainer.families.musicgen.family import MusicGenFamily
from trainer.families.musicgen.spec import MusicGen
from trainer.families.musicgen.weights import load_network, open_release, save_network
from trainer.spec.errors import UtaforgeError


@pytest.fixture(scope="module")
def upstream() -> MusicgenForConditionalGeneration:
    torch.manual_seed(0)
    config = MusicgenConfig(
        text_encoder=T5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2).to_dict(),
        audio_encoder=EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, codebook_size=16).to_dict(),
        decoder=MusicgenDecoderConfig(
            vocab_size=16, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=16, bos_token_id=16, max_position_embeddings=64,
        ).to_dict(),
    )  # fmt: skip
    return MusicgenForConditionalGeneration(config).eval()


@pytest.fixture
def release(upstream: MusicgenForConditionalGeneration, tmp_path: Path) -> Path:
    upstream.save_pretrained(tmp_path)
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>", "速い", "祭り", "slow"], "<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    return tmp_path


def family_of(release: Path) -> MusicGenFamily:
    return MusicGenFamily(MusicGen(family="musicgen", pretrained=f"file://{release}"))


def assert_is_upstream(release: Path, upstream: MusicgenForConditionalGeneration) -> None:
    state = upstream.state_dict()
    network = family_of(release).network()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(parameter.is_meta for parameter in [*network.parameters(), *network.buffers()])


def test_a_release_is_read_whole_in_shards_and_as_bin(
    release: Path, upstream: MusicgenForConditionalGeneration
) -> None:
    assert_is_upstream(release, upstream)
    (release / "model.safetensors").unlink()
    upstream.save_pretrained(release, max_shard_size="60KB")
    assert (release / "model.safetensors.index.json").exists()
    assert_is_upstream(release, upstream)
    for file in release.glob("model*"):
        file.unlink()
    positions = {"decoder.model.decoder.embed_positions.weights": torch.zeros(64, 32)}
    torch.save({**upstream.state_dict(), **positions}, release / "pytorch_model.bin")
    assert_is_upstream(release, upstream)


def test_the_releases_text_encoder_is_upstreams(release: Path, upstream: MusicgenForConditionalGeneration) -> None:
    found, other = (
        c["text_hidden"] for c in family_of(release).conditions([{"tags": "速い 祭り slow"}, {"tags": "slow"}])
    )
    with torch.no_grad():
        wanted = upstream.text_encoder(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    assert found.dtype == np.float16
    assert np.allclose(found, wanted.numpy(), atol=2e-3)
    assert other.shape == (1, 24)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(release: Path) -> None:
    state = load_file(release / "model.safetensors")
    moved = state.pop("enc_to_dec_proj.bias")
    state["enc_to_dec_proj.stray"] = moved
    state["decoder.lm_heads.2.weight"] = torch.zeros(3, 32)
    save_file(state, release / "model.safetensors")
    with pytest.raises(UtaforgeError) as caught:
        family_of(release).network()
    for problem in (
        "3 differences",
        "missing: enc_to_dec_proj.bias",
        "unexpected: enc_to_dec_proj.stray",
        "decoder.lm_heads.2.weight is (3, 32), should be (16, 32)",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "describes 'bert'"),
        ({"model_type": "musicgen", "decoder": {"audio_channels": 2}, "text_encoder": {}}, "stereo"),
        (None, "has no config.json"),
    ],
)
def test_what_is_not_a_mono_musicgen_is_refused(tmp_path: Path, config: dict | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UtaforgeError, match=message):
        open_release(tmp_path.as_uri())


def test_a_saved_network_is_read_back_in_half_precision(tmp_path: Path) -> None:
    release = open_release("random:tiny")
    network = load_network(release, dropout=0.0)
    save_network(release, network, tmp_path, {}, torch.float16)
    back = load_network(open_release(tmp_path.as_uri()), dropout=0.0)
    assert all(
        torch.equal(value.half().float(), back.state_dict()[name]) for name, value in network.state_dict().items()
    )
    assert family_of(tmp_path).conditions([{"tags": "祭り"}])[0]["text_hidden"].shape == (1, 64)


def test_a_trained_release_keeps_its_text_encoder_and_takes_the_trained_values(release: Path, tmp_path: Path) -> None:
    family = family_of(release)
    family.save(family.network(), tmp_path / "歌", {"enc_to_dec_proj.bias": torch.full((32,), 7.0)})
    back = family_of(tmp_path / "歌")
    assert back.network().enc_to_dec_proj.bias.tolist() == [7.0] * 32
    hidden = [either.conditions([{"tags": "祭り"}])[0]["text_hidden"] for either in (family, back)]
    assert np.array_equal(*hidden)

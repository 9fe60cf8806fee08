"""The SongBloom family on its tiny random network. Its numbers are in tests/golden."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.unit.families.conftest import examples, sampling
from trainer.adapt.lora import apply
from trainer.audio.write import encode
from trainer.families.base import Example
from trainer.families.songbloom.config import to_upstream
from trainer.families.songbloom.family import SongBloomFamily
from trainer.families.songbloom.generate import SeededDraws, Settings, generate
from trainer.families.songbloom.network import SongBloom as Network
from trainer.families.songbloom.spec import SongBloom
from trainer.families.songbloom.text import NO_TOKEN, Vocabulary, lyric_batch
from trainer.families.songbloom.weights import RANDOM, open_release
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.job import Prompt
from trainer.spec.model import Lora

LYRICS = "[verse] s a k u r a . s a k u r a , [chorus] y a y o i"
GREEDY = sampling("songbloom", guidance=1, top_k=1)


def family_of(pretrained: str, **options) -> SongBloomFamily:
    return SongBloomFamily(SongBloom(family="songbloom", pretrained=pretrained, **options))


@pytest.fixture(scope="module")
def family() -> SongBloomFamily:
    return family_of("random:tiny", cfg_dropout=0.5)


@pytest.fixture(scope="module")
def network(family: SongBloomFamily) -> Network:
    return family.network().eval()


def songs_of(family: SongBloomFamily, *lengths: int) -> list[Example]:
    draw = np.random.default_rng(0)
    songs = [
        {
            "sketch": draw.integers(0, 256, length).astype(np.uint16),
            "latents": draw.normal(size=(4, length)).astype(np.float16),
            "style": draw.normal(size=(4, 25)).astype(np.float16),
        }
        for length in lengths
    ]
    return examples(family, songs, {"lyrics": LYRICS})


def test_the_released_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = Network(RANDOM["full"])
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_872_260_801
    assert FAMILIES["songbloom"].dims.parameters == 1_872_260_801


def test_loss_does_not_depend_on_padding(family: SongBloomFamily, network: Network) -> None:
    songs = songs_of(family, 64, 16, 37)
    given = family.collate(songs, training=False).tensors
    together = network.plan(*_planned(network, given))
    for row, frames in enumerate((64, 16, 32)):
        alone = family.collate([songs[row]], training=False).tensors
        plan = network.plan(*_planned(network, alone))
        assert torch.allclose(together.states[row, : frames + 1], plan.states[0], atol=1e-5)
        assert torch.allclose(together.h[row, : frames // 16], plan.h[0], atol=1e-5)


def test_counts_are_known_before_the_forward_pass_and_evaluation_repeats(
    family: SongBloomFamily, network: Network
) -> None:
    batch = family.collate(songs_of(family, 64, 16, 37), training=False)
    assert batch.frames == 64 + 16 + 32
    assert batch.counts == {"ce": 64 + 16 + 32 + 3, "mse": 4 * (64 + 16 + 32)}
    first, second = family.sums(network, batch), family.sums(network, batch)
    assert torch.equal(first["ce"], second["ce"])
    assert torch.equal(first["mse"], second["mse"])
    assert first["ce"].item() / batch.counts["ce"] == pytest.approx(np.log(257), rel=0.02)


def test_conditions_are_dropped_as_often_as_asked(family: SongBloomFamily) -> None:
    [song] = songs_of(family, 16)
    batch = family.collate([replace(song, seed=seed) for seed in range(400)], training=True)
    without = batch.tensors["lyrics"][:, 0, 1] == NO_TOKEN
    unstyled = batch.tensors["prompt"].abs().sum((1, 2)) == 0
    assert (unstyled | ~without).all(), "without lyrics there is no style either"
    assert without.float().mean() == pytest.approx(0.5, abs=0.08)
    assert (unstyled & ~without).sum() / (~without).sum() == pytest.approx(0.1, abs=0.06)
    assert batch.tensors["lyrics"][without][0, :, 0].tolist() == [0, 0, 1], "the empty token, in sentence 1"


def test_an_adapter_of_the_planner_learns_from_both_losses(family: SongBloomFamily) -> None:
    network = family.network()
    network.gradient_checkpointing_enable()
    adapted = apply(network, Lora(type="lora", preset="songbloom/ar"), FAMILIES["songbloom"])
    batch = family.collate(songs_of(family, 48, 32), training=True)
    trained = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    for term in family.terms:
        gradients = torch.autograd.grad(family.sums(adapted, batch)[term], trained)
        assert all(gradient.abs().sum() > 0 for gradient in gradients), term


def test_ids_outside_the_tables_are_refused(family: SongBloomFamily) -> None:
    [song] = songs_of(family, 32)
    with pytest.raises(DataError, match=r"song 歌0: sketch holds .* the network knows 0 to 255"):
        family.collate([replace(song, arrays={**song.arrays, "sketch": np.full(32, 256)})], training=False)
    with pytest.raises(DataError, match="song 歌0: lyric_ids holds 999 to 999"):
        family.collate([replace(song, arrays={**song.arrays, "lyric_ids": np.array([999])})], training=False)
    with pytest.raises(DataError, match="song 歌0: has 15 frames, a block is 16"):
        family.collate(songs_of(family, 15), training=False)


def test_lines_divide_like_spaces(family: SongBloomFamily) -> None:
    flat, lines = (family.conditions([{"lyrics": text}])[0]["lyric_ids"]
                   for text in ("[verse] s a . [chorus] k u", "[verse]\ns a .\n\n[chorus]\nk u\n"))  # fmt: skip
    assert np.array_equal(flat, lines)
    assert len(flat) > 1


def test_unknown_lyrics_are_named(family: SongBloomFamily, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        [condition] = family.conditions([{"lyrics": "[verse] 桜 桜 a 咲く"}])
    assert len(condition["lyric_ids"]) == 2
    assert "3 of 5 tokens are not in the vocabulary and are left out: '桜' ×2, '咲く' ×1" in caplog.text
    family.conditions([{"lyrics": " ".join("a" * 65)}])
    assert "only the first 64 are heard" in caplog.text


def test_greedy_generation_is_teacher_forcing(family: SongBloomFamily, network: Network) -> None:
    [made] = family.generate(network, [Prompt(lyrics=LYRICS, seconds=1.28, seed=3)], GREEDY)
    assert made["sketch"].shape == (32,)
    assert made["latents"].shape == (4, 32)
    vocabulary = Vocabulary(network.config.tokens, network.config.sentences)
    lyrics = torch.from_numpy(lyric_batch([vocabulary.annotate(vocabulary.encode(LYRICS)[0])]))
    prefix = network.condition_provider(lyrics, torch.zeros(1, 1, 4))
    sketch, latents = torch.from_numpy(made["sketch"].astype(np.int64)), torch.from_numpy(made["latents"])
    logits = network.skeleton_classifier(network.plan(prefix, sketch[None], latents[None]).states)[0, :32]
    assert torch.equal(logits[:16].argmax(1), sketch[:16])
    likeliest = logits[16:].gather(1, sketch[16:, None])[:, 0] * 1.1
    assert (likeliest >= logits[16:].max(1).values - 1e-5).all(), "penalised, but never by more"


def test_songs_are_a_matter_of_their_own_prompt_and_seed(family: SongBloomFamily, network: Network) -> None:
    prompts = [Prompt(lyrics=LYRICS, seconds=1.28, seed=7), Prompt(lyrics="", seconds=0.64, seed=8)]
    together = family.generate(network, prompts, sampling("songbloom"))
    for prompt, song in zip(prompts, together, strict=True):
        [alone] = family.generate(network, [prompt], sampling("songbloom"))
        assert np.array_equal(alone["sketch"], song["sketch"])
        assert np.allclose(alone["latents"], song["latents"], atol=1e-4)
    assert [len(song["sketch"]) for song in together] == [32, 16]


def test_a_song_ends_where_the_planner_says_so(family: SongBloomFamily) -> None:
    ending = family.network().eval()
    with torch.no_grad():
        ending.get_parameter("skeleton_classifier.2.bias")[ending.config.eos] = 20.0
    lyrics = torch.zeros(2, 3, 1, dtype=torch.int64)
    settings = Settings(1, 1, temperature=1, top_k=0, steps=2, flow_temperature=1, repetition_penalty=1)
    [(sketch, latents)] = generate(ending, lyrics, torch.zeros(1, 1, 4), [64], [SeededDraws(0)], settings)
    assert sketch.shape == (0,)
    assert latents.shape == (4, 0)


def test_the_style_is_heard(family: SongBloomFamily, network: Network, tmp_path: Path) -> None:
    (tmp_path / "様式.wav").write_bytes(
        encode(np.random.default_rng(0).normal(0, 0.1, (2, 24_000)).astype(np.float32), 48_000, "wav")
    )
    plain = Prompt(lyrics=LYRICS, seconds=0.64, seed=1)
    styled = plain.model_copy(update={"style": f"file://{tmp_path}/様式.wav"})
    without, heard = (family.generate(network, [prompt], GREEDY)[0] for prompt in (plain, styled))
    assert not np.allclose(without["latents"], heard["latents"])


def test_what_is_saved_is_read_back(family: SongBloomFamily, network: Network, tmp_path: Path) -> None:
    values = {"bos_token": torch.ones(64)}
    family.save(network, tmp_path / "歌", values)
    again = family_of(f"file://{tmp_path}/歌")
    assert again.release.config == family.release.config
    read = again.network()
    for name, value in {**network.state_dict(), **values}.items():
        assert torch.equal(read.state_dict()[name], value), name


def test_a_release_is_read_with_its_vae_its_references_and_its_vocabulary(network: Network, tmp_path: Path) -> None:
    model = to_upstream(network.config)
    tokens = [*model["condition_provider_cfg"]["lyrics"]["vocab_list"][:-2], "on", "さ"]
    model["condition_provider_cfg"]["lyrics"] |= {
        "vocab_list": "${load_yaml:vocab_g2p.yaml}",
        "output_dim": "${model.dim}",
    }
    model["latent_dim"] = "${latent_dim}"
    (tmp_path / "full.yaml").write_text(yaml.safe_dump({"latent_dim": 4, "max_dur": 240, "model": model}))
    (tmp_path / "vocab_g2p.yaml").write_text(
        "\n".join(f"- {token}" if token.isalnum() else f"- {token!r}" for token in tokens)
    )
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    save_file({**state, "vae.encoder": torch.zeros(1)}, tmp_path / "full.safetensors")
    for url in (f"file://{tmp_path}", f"file://{tmp_path}/full.safetensors"):
        family = family_of(url)
        assert family.release.config == replace(network.config, tokens=tuple(tokens), max_seconds=240.0)
    assert torch.equal(family.network().bos_token, network.bos_token)
    with pytest.raises(UtaforgeError, match=r"model\.segment_seconds: 300 is more than the 240 s"):
        family_of(url, segment_seconds=300).network()


def test_a_wrong_release_is_refused_by_what_is_wrong(network: Network, tmp_path: Path) -> None:
    with pytest.raises(UtaforgeError, match=r"holds 0 releases \(none\)"):
        open_release(f"file://{tmp_path}")
    model = to_upstream(network.config)
    for change, told in (
        ({"diffusion_objective": "v"}, "diffusion_objective: v is not known here"),
        ({"dim": "${eval:4*16}"}, "dim, ffn should be numbers"),
        ({"fuser_cfg": {"prepend": ["lyrics"]}}, r"conditions \['lyrics'\]"),
    ):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"model": {**model, **change}}))
        (tmp_path / "wrong.pt").touch()
        with pytest.raises(UtaforgeError, match=told):
            open_release(f"file://{tmp_path}")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"model": {**model, "num_pitch": 128}}))
    torch.save({f"model.{name}": value for name, value in network.state_dict().items()}, tmp_path / "wrong.pt")
    with pytest.raises(UtaforgeError, match=r"skeleton_emb.weight is \(258, 64\), should be \(130, 64\)"):
        family_of(f"file://{tmp_path}").network()


def _planned(network: Network, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return network.condition_provider(given["lyrics"], given["prompt"]), given["sketch"], given["latents"]

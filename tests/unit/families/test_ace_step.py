import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.unit.families.conftest import ace_step_release, examples, sampling
from trainer.adapt import apply
from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.loader import validation_batches
from trainer.data.prepare import Tools, prepare_songs
from trainer.families.ace_step.family import SSL, AceStepFamily
from trainer.families.ace_step.generate import Sampler, follow, weakened
from trainer.families.ace_step.lyrics import START, BpeLyrics, romanised
from trainer.families.ace_step.network import AceStepNetwork, Config, Frames
from trainer.families.ace_step.spec import SPEC, AceStep
from trainer.families.ace_step.text import dimmed
from trainer.families.ace_step.weights import FULL, PART, WEIGHTS
from trainer.families.base import Arrays, Example
from trainer.families.text_encoder import T5Text
from trainer.spec.data import Prepare
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.family import lora_parameters
from trainer.spec.job import Prompt
from trainer.spec.model import Lora, TrainAlso

TEXTS = [{"tags": "童謡, piano", "lyrics": "[verse]\nさくら さくら"}, {"tags": "", "lyrics": "らら"}]
FRAMES = (30, 21)


def make(pretrained: str = "random:tiny", **options) -> AceStepFamily:
    return AceStepFamily(AceStep(family="ace_step", pretrained=pretrained, **options))


def songs_of(family: AceStepFamily, ssl: bool = False) -> list[Example]:
    dice = np.random.default_rng(0)
    songs: list[Arrays] = []
    for frames in FRAMES:
        shapes = {"latents": (8, 16, frames)}
        if ssl:
            seconds = frames / family.frame_rate
            shapes |= {"mert": (round(seconds * 75), 8), "mhubert": (round(seconds * 50), 8)}
        songs.append({name: dice.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()})
    return examples(family, songs, *TEXTS)


def mean_loss(family: AceStepFamily, network: torch.nn.Module, batch) -> torch.Tensor:
    sums = family.sums(network, batch)
    return torch.stack([family.terms[name] * value / batch.counts[name] for name, value in sums.items()]).sum()


@pytest.fixture(scope="module")
def family() -> AceStepFamily:
    return make()


@pytest.fixture(scope="module")
def network(family) -> AceStepNetwork:
    return family.network().eval()


def test_the_full_size_has_the_release_s_parameters_and_no_buffers():
    with torch.device("meta"):
        network = AceStepNetwork(Config.of(FULL, "full"))
    assert sum(p.numel() for p in network.parameters()) == SPEC.dims.parameters == 3_305_659_264
    assert not list(network.buffers())
    adapted = apply(network, Lora(type="lora", preset="ace-step/upstream", rank=1), SPEC)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 1_022_976


@pytest.mark.parametrize("dora", [False, True])
def test_a_plan_counts_what_is_trained_when_the_lyric_encoder_is_trained_in_full(dora: bool) -> None:
    with torch.device("meta"):
        network = AceStepNetwork(Config.of(FULL, "full"))
    method = Lora(type="lora", rank=2, dora=dora, train_also=tuple(TrainAlso(modules=one) for one in SPEC.train_also))
    adapted = apply(network, method, SPEC)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    also = SPEC.train_also
    planned = lora_parameters(SPEC, SPEC.dims, 2, SPEC.targets(method), dora=dora, train_also=also)
    assert trained == planned + sum(also.values())
    assert not any("lora_" in name for name, _ in adapted.base_model.model.lyric_encoder.named_parameters())


@pytest.mark.parametrize("ssl", [False, True])
def test_everything_that_is_trainable_learns(ssl):
    family = make(ssl_features=ssl)
    network = family.network().train()
    mean_loss(family, network, family.collate(songs_of(family, ssl), training=True)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
    assert any(p.requires_grad for p in network.projectors.parameters()) == ssl


def test_an_adapter_changes_nothing_at_first_and_then_learns(family, network):
    batch = family.collate(songs_of(family), training=False)
    before = mean_loss(family, network, batch)
    adapted = apply(family.network(), Lora(type="lora", preset="ace-step/upstream", rank=4, rslora=True), SPEC)
    assert torch.equal(mean_loss(family, adapted.eval(), batch), before)
    mean_loss(family, adapted.train(), batch).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_B" in n)


def test_checkpointing_gives_the_same_gradients(family):
    batch = family.collate(songs_of(family), training=False)
    found = []
    for checkpointing in (False, True):
        network = family.network().eval()
        if checkpointing:
            network.gradient_checkpointing_enable()
        mean_loss(family, network, batch).backward()
        found.append(network.proj_in.early_conv_layers[0].weight.grad)
    assert torch.equal(*found)


def test_a_song_is_computed_as_if_it_were_alone(family, network):
    def velocity(songs):
        tensors = family.collate(songs, training=False).tensors
        latents, inside = tensors["latents"].float(), tensors["inside"]
        time = torch.full((len(songs),), 500.0)
        return network(latents, time, family._conditions(tensors), Frames(inside, inside))[0]

    songs = songs_of(family)
    together, alone = velocity(songs)[1, ..., : FRAMES[1]], velocity(songs[1:])[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_counts_are_of_the_songs_own_frames():
    family = make(ssl_features=True)
    batch = family.collate(songs_of(family, ssl=True), training=False)
    assert batch.frames == sum(FRAMES)
    seconds = [frames / family.frame_rate for frames in FRAMES]
    wanted = {"mse": sum(FRAMES) * 128, "ssl/mert": sum(round(s * 75) for s in seconds)}
    assert batch.counts == {**wanted, "ssl/mhubert": sum(round(s * 50) for s in seconds)}
    assert family.terms == {"mse": 1.0, "ssl/mert": 0.5, "ssl/mhubert": 0.5}


def test_evaluation_repeats_itself_and_training_follows_torch_s_generator(family, network):
    batch = family.collate(songs_of(family), training=False)
    assert torch.equal(mean_loss(family, network, batch), mean_loss(family, network, batch))
    training = family.network().train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(mean_loss(family, training, batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_tags_and_lyrics_are_dropped_by_the_example_s_seed_and_only_in_training(family):
    first = songs_of(family)[0]
    songs = [Example(first.id, first.arrays, first.text, seed) for seed in range(400)]
    batch = family.collate(songs, training=True)
    no_tags = ~batch.tensors["text_hidden"].any(2).any(1)
    no_lyrics = ~batch.tensors["lyric_mask"].any(1)
    assert batch.tensors["text_mask"].all(), "dropped tags are still attended to, as zeros"
    assert 0.1 < no_tags.float().mean() < 0.2 and 0.1 < no_lyrics.float().mean() < 0.2
    assert (no_tags & no_lyrics).float().mean() < 0.06
    again = family.collate(songs[5:6], training=True)
    assert torch.equal(again.tensors["lyric_mask"].any(1), ~no_lyrics[5:6])
    assert family.collate(songs, training=False).tensors["lyric_mask"].all()


def test_generated_songs_follow_from_their_own_prompt_and_seed(family, network):
    ja = Prompt(tags="童謡", lyrics="さくら さくら", seconds=2.5, seed=1)
    en = Prompt(tags="rock, guitar", seconds=4, seed=2)
    asked = sampling("ace_step", guidance=4)
    together = family.generate(network, [ja, en], asked)
    alone = family.generate(network, [ja], asked)
    other = family.generate(network, [ja.model_copy(update={"seed": 3})], asked)
    assert [song["latents"].shape for song in together] == [(8, 16, 26), (8, 16, 43)]
    assert together[0]["latents"].dtype == np.float16
    np.testing.assert_allclose(together[0]["latents"], alone[0]["latents"], atol=4e-3)
    assert np.abs(other[0]["latents"] - alone[0]["latents"]).max() > 0.5


def bare(kind: str, steps: int) -> Sampler:
    """Neither guided nor stretched."""
    return Sampler(kind, steps, guidance=1.0, omega=0.0)


def end_of(kind: str, steps: int, spread: float) -> float:
    """How far from its place, relatively, a song ends in the exact flow to songs around 0 that are ``spread`` apart.

    Noise of σ = 1 ends, by the flow, at ``spread`` times itself: latents keep their place among all that there are.
    """
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    dice = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 8, 16, 4, generator=dice, dtype=torch.float64) for _ in range(steps + 1)]

    def flow(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = sigma**2 + (1 - sigma) ** 2 * spread**2
        return latents * (sigma - (1 - sigma) * spread**2) / variance

    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    *_, (_, ended) = follow(flow, iter(noise), sigmas, Frames(everywhere, everywhere), bare(kind, steps))
    return float((ended - spread * noise[0]).norm() / noise[0].norm())


@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
def test_an_ode_sampler_converges_with_its_order(kind, order):
    coarse, fine = end_of(kind, 64, spread=0.5), end_of(kind, 128, spread=0.5)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("steps", [1, 2, 27])
def test_pingpong_ends_without_noise_where_there_is_one_song(steps):
    assert end_of("pingpong", steps, spread=0.0) < 1e-12


def test_pingpong_does_not_end_where_the_flow_from_its_first_noise_does():
    assert end_of("pingpong", 64, spread=0.5) > 0.3 > end_of("euler", 64, spread=0.5)


def test_heun_calls_the_network_twice_a_step_but_for_the_last(family, network):
    calls = []
    handle = network.final_layer.register_forward_hook(lambda *_: calls.append(1))
    family.generate(network, [Prompt(seconds=1)], sampling("ace_step", guidance=1, sampler="heun", steps=5))
    handle.remove()
    assert len(calls) == 9


def test_samplers_are_guided_in_as_many_calls(family, network):
    def calls_of(kind: str) -> int:
        calls = []
        handle = network.final_layer.register_forward_hook(lambda *_: calls.append(1))
        family.generate(network, [Prompt(seconds=1)], sampling("ace_step", sampler=kind, steps=8))
        handle.remove()
        return len(calls)

    assert [calls_of(kind) for kind in ("euler", "heun", "pingpong")] == [8 + 4, 15 + 4, 8 + 4]


@pytest.mark.parametrize("kind", ["heun", "pingpong"])
def test_every_sampler_makes_a_song_of_its_own_prompt_and_seed(family, network, kind):
    ja, en = Prompt(tags="童謡", lyrics="さくら", seconds=2.5, seed=1), Prompt(tags="rock", seconds=4, seed=2)
    asked = sampling("ace_step", guidance=4, sampler=kind, steps=12)
    together = family.generate(network, [en, ja], asked)
    alone, again = (family.generate(network, [ja], asked)[0]["latents"] for _ in range(2))
    (other,) = family.generate(network, [ja.model_copy(update={"seed": 3})], asked)
    (euler,) = family.generate(network, [ja], sampling("ace_step", guidance=4, steps=12))
    assert np.array_equal(alone, again)
    np.testing.assert_allclose(together[1]["latents"], alone, atol=4e-3)
    assert np.abs(other["latents"] - alone).max() > 0.5
    assert np.abs(euler["latents"] - alone).max() > 0.05


def test_weakening_ends_with_its_block(network):
    layer, given = network.t_block[1], torch.ones(1, network.config.inner_dim)
    before = layer(given)
    with weakened([layer], 0.5):
        assert torch.equal(layer(given), before * 0.5)
    assert torch.equal(layer(given), before)


def test_a_saved_network_is_a_release(family, network, tmp_path):
    table = torch.ones_like(network.final_layer.scale_shift_table)
    family.save(network, tmp_path / "歌", {"final_layer.scale_shift_table": table})
    again = make(f"file://{tmp_path}/歌")
    state = again.network().state_dict()
    assert torch.equal(state.pop("final_layer.scale_shift_table"), table)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert np.array_equal(again.conditions(TEXTS)[0]["lyric_ids"], family.conditions(TEXTS)[0]["lyric_ids"])


def test_a_wrong_release_is_refused_with_every_key(family, network, tmp_path):
    family.save(network, tmp_path, {})
    state = load_file(tmp_path / WEIGHTS)
    state["歌"] = state.pop("lyric_proj.weight")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(UtaforgeError, match=r"missing: lyric_proj.weight(.|\n)*unexpected: 歌"):
        make(f"file://{tmp_path}").network()
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 2}))
    with pytest.raises(UtaforgeError, match="it lacks attention_head_dim"):
        make(f"file://{tmp_path}").network()


def test_lyrics_of_another_vocabulary_are_refused(family):
    first = songs_of(family)[0]
    wrong = {**first.arrays, "lyric_ids": np.array([1, 6692], np.int32)}
    with pytest.raises(DataError, match="歌 has lyric tokens 1 to 6692, the network knows 0 to 255"):
        family.collate([Example("歌", wrong, {}, 0)], training=True)


def test_features_that_are_missing_or_of_the_uncut_song_are_refused():
    family = make(ssl_features=True)
    with pytest.raises(DataError, match="歌0 has no mert features") as caught:
        family.collate(songs_of(family), training=False)
    assert "put SONG.mert.npy beside each song" in caught.value.cure
    whole = songs_of(family, ssl=True)[0]
    cut = {**whole.arrays, "latents": whole.arrays["latents"][..., :5]}
    with pytest.raises(DataError, match=r"raise model\.segment_seconds"):
        family.collate([Example("歌", cut, {}, 0)], training=False)


@pytest.fixture
def sung(tmp_path: Path) -> Path:
    """A folder of two songs of 3 s with the features of both encoders beside them."""
    folder, dice = tmp_path / "歌", np.random.default_rng(0)
    folder.mkdir()
    for name in ("さくら", "こいのぼり"):
        save(folder / f"{name}.wav", dice.normal(0, 0.1, (2, 3 * 44_100)).astype(np.float32), 44_100, "wav")
        (folder / f"{name}.txt").write_text("童謡", encoding="utf-8")
        (folder / f"{name}.lyrics").write_text("らら", encoding="utf-8")
        for kind, rate in SSL.items():
            np.save(folder / f"{name}.{kind}.npy", dice.standard_normal((round(3 * rate) - 1, 8), np.float32))
    return folder


def tools_for(source: dict[str, str], **options) -> Tools:
    model = AceStep(family="ace_step", pretrained="random:tiny", **options)
    spec = Prepare.model_validate({"source": source})
    return Tools(spec, open_codec(model), AceStepFamily(model), "ace_step")


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_features_beside_the_songs_of_a_source_are_learned_from(sung: Path, tmp_path: Path, kind: str) -> None:
    source = {"type": "folder", "path": str(sung)}
    if kind == "jsonl":
        lines = [json.dumps({"path": f"{name}.wav", "tags": "童謡"}) for name in ("さくら", "こいのぼり")]
        (sung / "曲.jsonl").write_text("\n".join(lines), encoding="utf-8")
        source = {"type": "jsonl", "path": str(sung / "曲.jsonl")}
    tools = tools_for(source, ssl_features=True)
    dataset = prepare_songs(f"file://{tmp_path}/資料", tools)
    given = np.load(sung / "さくら.mhubert.npy")
    assert np.array_equal(dataset.song("さくら").arrays["mhubert"], given.astype(np.float16))
    family, frames = tools.family, round(30 * tools.family.frame_rate)
    ((batch, _),) = validation_batches(
        [dataset], [dataset.songs.ids], family.collate, micro_frames=frames, segment_frames=frames
    )
    assert batch.counts["ssl/mert"] == 2 * 224 and batch.counts["ssl/mhubert"] == 2 * 149
    network = family.network().train()
    mean_loss(family, network, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.projectors.parameters())


def test_songs_without_their_features_or_with_those_of_others_are_left_out(sung: Path, tmp_path: Path) -> None:
    source, url = {"type": "folder", "path": str(sung)}, f"file://{tmp_path}/資料"
    plain = prepare_songs(url, tools_for(source))
    assert len(plain.songs) == 2 and "mert" not in plain.song("さくら").arrays
    np.save(sung / "こいのぼり.mert.npy", np.zeros((900, 8), np.float32))
    (reason,) = (failure.reason for failure in prepare_songs(url, tools_for(source, ssl_features=True)).failures)
    assert reason == "the mert features given with it are those of 12.0 s at 75 a second, the song has 3.0 s"
    np.save(sung / "こいのぼり.mert.npy", np.zeros((8, 225), np.float32))
    (reason,) = (failure.reason for failure in prepare_songs(url, tools_for(source, ssl_features=True)).failures)
    assert reason == "the mert features given with it are float32 [8, 225], the model takes floats [L, 8]"
    np.save(sung / "こいのぼり.mert.npy", np.full((225, 8), 1e6, np.float32))
    (reason,) = (failure.reason for failure in prepare_songs(url, tools_for(source, ssl_features=True)).failures)
    assert "float16" in reason
    (sung / "こいのぼり.mert.npy").unlink()
    dataset = prepare_songs(url, tools_for(source, ssl_features=True))
    assert dataset.songs.ids == ["さくら"]
    assert [(failure.name, failure.reason) for failure in dataset.failures] == [
        ("こいのぼり.wav", "has no こいのぼり.mert.npy beside it, which the model asks for")
    ]


@pytest.mark.parametrize(
    ("japanese", "latin"),
    [
        ("さくら さくら", "sakura sakura"),
        ("しゅっぱつ、ちょっと！", "shuppatsu, chotto! "),
        ("マッチ・ラーメン", "matchi raamen"),
        ("ファイト じゃあね", "faito jaane"),
    ],
)
def test_kana_become_latin_letters(japanese, latin):
    assert romanised(japanese) == latin


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    words = ["[STOP]", "[UNK]", "[LINE]", "[en]", "[ja]", "[SPACE]", "[verse]", "sakura", "hello"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("sakura", "isolated")
    tokenizer.add_special_tokens(words[3:7])
    tokenizer.save(str(tmp_path / "vocab.json"))
    return tmp_path / "vocab.json"


def test_lyrics_become_lines_of_tokens_with_their_language(vocabulary):
    tokens = BpeLyrics(vocabulary)
    assert tokens("[verse]\nさくら　さくら\n\nHello").tolist() == [START, 3, 6, 2, 4, 7, 5, 7, 2, 2, 3, 8, 2]
    assert len(tokens(" \n")) == 0


def test_lyrics_that_the_vocabulary_cannot_write_are_refused(vocabulary):
    tokens = BpeLyrics(vocabulary)
    with pytest.raises(DataError, match="cannot write the line '桜'"):
        tokens("桜")
    with pytest.raises(DataError, match="the network takes 4096"):
        tokens("hello\n" * 2000)
    with pytest.raises(UtaforgeError, match="is no vocabulary"):
        BpeLyrics(vocabulary.parent / "無い.json")("hello")


def test_tags_are_read_by_the_umt5_of_the_release_and_dimly_for_guidance(tmp_path):
    top = ace_step_release(tmp_path / "公開")
    texts = [make(f"file://{top}{inside}")._text for inside in ("", f"/{PART}", f"/{PART}/{WEIGHTS}")]
    for text in texts:
        assert isinstance(text, T5Text) and text.folder == top / "umt5-base"
    text = T5Text(top / "umt5-base", "umt5", 32, most=4)
    clear, weak = (read(["童謡 piano", "piano " * 9]) for read in (text, partial(dimmed, text)))
    assert [hidden.shape for hidden in clear] == [(2, 32), (4, 32)]
    assert clear[0].dtype == np.float16
    assert np.abs(clear[0] - weak[0]).max() > 0
    assert np.array_equal(texts[0](["童謡 piano"])[0], clear[0])


def test_a_release_without_its_text_parts_says_what_to_set(family, network, tmp_path):
    family.save(network, tmp_path, {})
    told = json.loads((tmp_path / "config.json").read_text())
    told.pop("hashed_conditions")
    (tmp_path / "config.json").write_text(json.dumps(told))
    bare = make(f"file://{tmp_path}")
    with pytest.raises(UtaforgeError, match=r"model\.text_encoder"):
        bare.conditions(TEXTS)
    with pytest.raises(UtaforgeError, match=r"model\.lyric_vocabulary"):
        make(f"file://{tmp_path}", text_encoder=f"file://{tmp_path}")._lyrics("さくら")

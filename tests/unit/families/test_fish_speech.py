"""The fish-speech family on its tiny random networks."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tests.unit.families.conftest import examples, fish_speech_release, random_codes, sampling
from trainer.audio.write import encode
from trainer.families.base import Example
from trainer.families.cross_entropy import NO_LABEL
from trainer.families.fish_speech.adapter import from_upstream, to_upstream
from trainer.families.fish_speech.family import FishSpeechFamily
from trainer.families.fish_speech.generate import Sampler
from trainer.families.fish_speech.network import FishSpeechNetwork
from trainer.families.fish_speech.objective import Reference, example, prompt
from trainer.families.fish_speech.spec import SPEC, FishSpeech
from trainer.families.fish_speech.text import Bytes, Ranks, clean
from trainer.families.fish_speech.weights import open_release
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.job import Prompt

VERSIONS = ("1.4", "1.5")
TEXT = "さくら さくら, 野山も里も"
RELEASED = {"1.4": 494_462_976, "1.5": 637_921_280}


def model(version: str, pretrained: str) -> FishSpeech:
    return FishSpeech.model_validate({"family": "fish_speech", "pretrained": pretrained, "version": version})


def family(version: str = "1.5", pretrained: str = "random:tiny") -> FishSpeechFamily:
    return FishSpeechFamily(model(version, pretrained))


@pytest.fixture(scope="module", params=VERSIONS)
def tiny(request: pytest.FixtureRequest) -> tuple[FishSpeechFamily, FishSpeechNetwork]:
    found = family(request.param)
    return found, found.network().eval()


def songs_of(family: FishSpeechFamily, *lengths: int) -> list[Example]:
    return examples(family, random_codes(8, 1000, lengths), {"lyrics": TEXT})


@pytest.mark.parametrize("version", VERSIONS)
def test_the_released_size_has_the_released_parameters(version: str) -> None:
    release = open_release(model(version, "random:full"))
    with torch.device("meta"):
        network = FishSpeechNetwork(release.config, release.tokenizer().semantic)
    assert sum(parameter.numel() for parameter in network.parameters()) == RELEASED[version]
    assert not list(network.buffers())


def test_1_5_learns_what_follows_the_header_of_the_answer() -> None:
    tokenizer, codes = Bytes("1.5", Bytes.least("1.5")), torch.tensor([[7, 1], [0, 9]])
    inputs, labels = example(tokenizer, TEXT, "", codes)
    before = tokenizer(
        "<|im_start|>system\nSpeak out the provided text.<|im_end|>"
        f"<|im_start|>user\n{TEXT}<|im_end|><|im_start|>assistant\n<|voice|>"
    )
    first = tokenizer.semantic.start
    assert inputs[0].tolist() == [*before, first + 7, first + 1]
    assert inputs[1:, -2:].equal(codes) and not inputs[1:, :-2].any()
    learned = [before[-1], first + 7, first + 1, tokenizer.end]
    assert labels[0].tolist() == [NO_LABEL] * (len(before) - 2) + learned
    assert labels[1].tolist() == [NO_LABEL] * (len(before) - 1) + [7, 1, 0]


def test_1_4_learns_the_text_too_counts_codes_from_one_and_knows_speakers_by_name() -> None:
    tokenizer, codes = Bytes("1.4", Bytes.least("1.4")), torch.tensor([[7, 1], [0, 9]])
    inputs, labels = example(tokenizer, TEXT, "花子", codes)
    before = tokenizer(f"<|im_start|>user\n{TEXT}<|im_end|><|im_start|>花子\n")
    assert inputs[0].tolist() == [*before, 5, 5]
    assert labels[0].tolist() == [*before[1:], 5, 5, tokenizer.end]
    assert inputs[1:, -2:].equal(codes + 1)
    assert labels[2].tolist() == [NO_LABEL] * (len(before) - 1) + [1, 10, 0]


def test_a_reference_is_a_turn_of_its_own_that_was_answered_before() -> None:
    voice = Reference("野山も里も", torch.tensor([[7, 1], [0, 9]]))
    newer, older = (Bytes(version, Bytes.least(version)) for version in ("1.5", "1.4"))
    before = newer(
        "<|im_start|>system\nSpeak out the provided text.<|im_end|>"
        "<|im_start|>user\n野山も里も<|im_end|><|im_start|>assistant\n<|voice|>"
    )
    after = newer(f"<|im_end|><|im_start|>user\n{TEXT}<|im_end|><|im_start|>assistant\n<|voice|>")
    first = newer.semantic.start
    given = prompt(newer, TEXT, "", 2, voice)
    assert given[0].tolist() == [*before, first + 7, first + 1, *after]
    assert given[1:, len(before) : -len(after)].equal(voice.codes)
    assert not given[1:, : len(before)].any() and not given[1:, -len(after) :].any()
    before = older("<|im_start|>user\n野山も里も<|im_end|><|im_start|>花子\n")
    after = older(f"<|im_end|><|im_start|>user\n{TEXT}<|im_end|><|im_start|>花子\n")
    given = prompt(older, TEXT, "花子", 2, voice)
    assert given[0].tolist() == [*before, 5, 5, *after]
    assert given[1:, len(before) : -len(after)].equal(voice.codes + 1)
    assert not given[1:, : len(before)].any() and not given[1:, -len(after) :].any()


def test_sums_are_over_the_counted_labels_and_padding_changes_nothing(
    tiny: tuple[FishSpeechFamily, FishSpeechNetwork],
) -> None:
    room, network = tiny
    both = room.collate(songs_of(room, 20, 9), training=True)
    alone = [room.collate([song], training=True) for song in songs_of(room, 20, 9)]
    assert both.frames == 29
    assert both.counts == {term: sum(batch.counts[term] for batch in alone) for term in room.terms}
    assert both.counts["semantic"] == 8 * (29 + 2)
    with torch.no_grad():
        together = room.sums(network, both)
        apart = [room.sums(network, batch) for batch in alone]
    for term, value in together.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, apart[0][term] + apart[1][term], rtol=1e-5, atol=0)


def test_recomputed_activations_give_the_same_gradients_and_every_parameter_has_one() -> None:
    room, gradients = family(), []
    batch = room.collate(songs_of(room, 12), training=True)
    for recompute in (False, True):
        network = room.network().train()
        if recompute:
            network.gradient_checkpointing_enable()
        torch.stack(list(room.sums(network, batch).values())).sum().backward()
        gradients.append({name: each.grad for name, each in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_batch_without_any_code_still_uses_every_parameter() -> None:
    room = family()
    network = room.network()
    song = Example("無音", {"codes": np.zeros((8, 3), np.uint16)}, {"lyrics": TEXT}, 0)
    torch.stack(list(room.sums(network, room.collate([song], training=True)).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_songs_follow_from_their_own_seed_whatever_else_is_in_the_batch(
    tiny: tuple[FishSpeechFamily, FishSpeechNetwork],
) -> None:
    room, network = tiny
    wanted = [
        Prompt(lyrics=TEXT, seconds=1, seed=1),
        Prompt(lyrics="a little longer than that, ねえ", seconds=0.5, seed=2),
    ]
    asked = sampling("fish_speech", temperature=1.0, top_k=250)
    together = room.generate(network, wanted, asked)
    (alone,) = room.generate(network, wanted[1:], asked)
    assert np.array_equal(together[1]["codes"], alone["codes"])
    for song in together:
        assert song["codes"].dtype == np.uint16 and song["codes"].shape[1] >= 1 and song["codes"].max() < 1000
    (other,) = room.generate(network, [wanted[0].model_copy(update={"seed": 3})], asked)
    assert not np.array_equal(other["codes"], together[0]["codes"])


def test_a_voice_is_heard_by_its_own_song_alone(
    tiny: tuple[FishSpeechFamily, FishSpeechNetwork], tmp_path: Path
) -> None:
    room, asked = tiny[0], sampling("fish_speech", top_k=6)
    network = room.network().eval()
    if not network.code_in_token:  # the first six tokens are alike, and one of them is followed by codes
        nn.init.zeros_(network.output.weight)
    sound = np.random.default_rng(0).normal(0, 0.1, (1, 22_050)).astype(np.float32)
    (tmp_path / "声.wav").write_bytes(encode(sound, 44_100, "wav"))
    plain = Prompt(lyrics=TEXT, seconds=1, seed=6)
    voiced = plain.model_copy(update={"style": f"file://{tmp_path}/声.wav", "style_text": "夕焼け小焼け"})
    other = voiced.model_copy(update={"seed": 0})
    together = [song["codes"] for song in room.generate(network, [plain, voiced, other], asked)]
    for each, codes in zip((plain, voiced, other), together, strict=True):
        (alone,) = room.generate(network, [each], asked)
        assert np.array_equal(alone["codes"], codes)
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together[1], together[2])
    with pytest.raises(DataError, match="prompt 1 has only one of style and style_text"):
        room.generate(network, [voiced.model_copy(update={"style_text": None})], asked)
    with pytest.raises(UtaforgeError, match=r"validation\.prompts\.style: there is no /無い"):
        room.generate(network, [voiced.model_copy(update={"style": "file:///無い"})], asked)


def test_greedy_frames_are_those_of_the_whole_sequence_seen_at_once(
    tiny: tuple[FishSpeechFamily, FishSpeechNetwork],
) -> None:
    room, network = tiny
    batch = room.greedy(network, songs_of(room, 1)[0], 6)
    with torch.no_grad():
        tokens, codes = room.predictions(network, batch)
    assert len(tokens.ids) == batch.frames == 6
    assert len(codes.ids) in ([6 * 7] if network.code_in_token else range(0, 6 * 8 + 1, 8))
    for found in (tokens, codes):
        assert found.logits.argmax(1).equal(found.ids)


def test_the_sampler_draws_from_the_nucleus_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)
    draws = torch.arange(1000) / 1000
    ids = Sampler(temperature=1.0, top_p=0.85, top_k=0, repetition_penalty=1.0)(logits, draws, None)
    assert torch.bincount(ids, minlength=4).tolist() == pytest.approx([625, 375, 0, 0], abs=1)
    best = Sampler(temperature=0.7, top_p=0.7, top_k=1, repetition_penalty=1.0)
    assert best(logits, draws, None).eq(0).all()
    recent = torch.zeros(1000, 1, dtype=torch.long)
    assert replace(best, repetition_penalty=2.0)(logits, draws, recent).eq(1).all()


def test_what_cannot_be_is_told() -> None:
    room = family()
    network = room.network()
    with pytest.raises(DataError, match=r"song 歌0 needs .* positions"):
        room.collate(songs_of(room, 5000), training=True)
    with pytest.raises(DataError, match="prompt 1 needs"):
        room.generate(network, [Prompt(lyrics=TEXT, seconds=300)], sampling("fish_speech"))
    with pytest.raises(DataError, match="prompt 1 names a speaker"):
        room.generate(network, [Prompt(lyrics=TEXT, speaker="花子")], sampling("fish_speech"))


def test_ranks_are_merged_lowest_first_and_special_tokens_count_as_such(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + ["さ".encode(), "さく".encode(), b"bc", b"ab", b"xabc"]
    tokens.insert(256, "さ".encode()[:2])
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    tokenizer = Ranks(tmp_path / "tokenizer.tiktoken")
    assert tokenizer("さく") == [258]
    assert tokenizer("abc") == [97, 259], "bc comes before ab"
    assert tokenizer("xabc") == [261], "a whole piece that has a rank is taken as it is"
    assert tokenizer("<|im_start|>さ<|im_end|>") == [262 + 3, 257, tokenizer.end]
    assert tokenizer.semantic == range(262 + 12, 262 + 12 + 1024)
    assert tokenizer("1 2") == [49, 32, 50]


@pytest.mark.parametrize(
    ("text", "in_1_4", "in_1_5"),
    [
        ("  さくら\n さくら 🎵 ‘花’,,, \t", "さくら さくら  '花',", "さくら さくら  '花',"),
        ("「桜」《花》 “春”…… 霞か；雲か：", "'桜''花' '春'. 霞か,雲か,", "「桜」《花》 “春”…… 霞か；雲か："),
        ("(弥生)の・空は～【見わたす】——限り.,.", "弥生の空は見わたす限り.", "(弥生)の・空は～【見わたす】——限り.,."),
        ("ああ、、『いざ』。。！？ 〜 a: ー", "ああ、、『いざ』。。！？ 〜 a, ー", "ああ、、『いざ』。。！？ 〜 a: ー"),
    ],
)
def test_texts_are_cleaned_as_the_versions_upstream_cleans_them(text: str, in_1_4: str, in_1_5: str) -> None:
    assert clean(text, "1.4") == in_1_4
    assert clean(text, "1.5") == in_1_5


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_saved_is_a_release_again(version: str, tmp_path: Path) -> None:
    room = family(version)
    network = room.network()
    changed = torch.ones_like(network.output.weight)
    folder = tmp_path / "公開"
    room.save(network, folder, {"output.weight": changed})
    fish_speech_release(folder, version)
    back = family(version, f"file://{folder}").network()
    assert back.output.weight.equal(changed)
    assert back.norm.weight.equal(network.norm.weight) and back.semantic != network.semantic
    state = torch.load(folder / "model.pth", weights_only=True)
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, folder / "model.pth")
    assert family(version, f"file://{folder}/model.pth").network().output.weight.equal(changed)


def test_a_wrong_release_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    room = family("1.5")
    room.save(room.network(), tmp_path, {})
    fish_speech_release(tmp_path)
    with pytest.raises(UtaforgeError, match=r"has no tokenizer.tiktoken"):
        family("1.5", f"file://{tmp_path}").network()
    fish_speech_release(tmp_path, "1.4")
    with pytest.raises(UtaforgeError, match=r"write model.version: '1.4'"):
        family("1.5", f"file://{tmp_path}").network()
    fish_speech_release(tmp_path, "1.5")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    del state["norm.weight"]
    torch.save({**state, "歌.weight": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(UtaforgeError, match=r"missing: norm.weight\n  unexpected: 歌.weight"):
        family("1.5", f"file://{tmp_path}").network()
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))
    with pytest.raises(UtaforgeError, match="tie_word_embeddings is True"):
        family("1.5", f"file://{tmp_path}").network()


def test_adapters_go_to_upstreams_names_and_back(tmp_path: Path) -> None:
    adapted = _adapted()
    adapted.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    state = {f"model.{key}": value for key, value in to_upstream(saved).items()}
    assert state["model.embeddings.lora_A"].shape == (8, Bytes.least("1.5"))
    assert state["model.fast_layers.0.attention.wqkv.lora_B"].shape == (128, 8)
    back = from_upstream({**state, "model.norm.weight": torch.zeros(1)})
    assert back.keys() == saved.keys() and all(back[name].equal(saved[name]) for name in saved)
    assert not set_peft_model_state_dict(adapted, back).unexpected_keys


def _adapted() -> PeftModel:
    chosen = list(SPEC.presets["fish-speech/r8a16"].targets)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=chosen, init_lora_weights=False)
    adapted = get_peft_model(family().network(), config)
    assert isinstance(adapted, PeftModel)
    return adapted

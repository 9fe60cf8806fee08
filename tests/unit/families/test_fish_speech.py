"""The fish-speech family on its tiny random networks."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from tests.unit.families.conftest import examples, random_codes, word_tokenizer
from trainer.families import Example
from trainer.families.cross_entropy import NO_LABEL
from trainer.families.fish_speech.adapter import export_adapter, from_upstream
from trainer.families.fish_speech.family import FishSpeechFamily
from trainer.families.fish_speech.generate import Sampler, generate
from trainer.families.fish_speech.network import FishSpeechNetwork
from trainer.families.fish_speech.objective import example, prompt
from trainer.families.fish_speech.protos import read_protos
from trainer.families.fish_speech.text import Bytes, Json, Ranks, clean
from trainer.families.fish_speech.weights import BYTES, open_release
from trainer.families.sampling import draw_table
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.families import FISH_SPEECH
from trainer.spec.job import Prompt, Sampling
from trainer.spec.model import FishSpeech

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
    together = room.generate(network, wanted, Sampling())
    (alone,) = room.generate(network, wanted[1:], Sampling())
    assert np.array_equal(together[1]["codes"], alone["codes"])
    for song in together:
        assert song["codes"].dtype == np.uint16 and song["codes"].shape[1] >= 1 and song["codes"].max() < 1000
    (other,) = room.generate(network, [wanted[0].model_copy(update={"seed": 3})], Sampling())
    assert not np.array_equal(other["codes"], together[0]["codes"])


def test_greedy_frames_are_those_of_the_whole_sequence_seen_at_once(
    tiny: tuple[FishSpeechFamily, FishSpeechNetwork],
) -> None:
    room, network = tiny
    before = prompt(room.tokenizer, TEXT, "", 8)
    sampler = Sampler(top_k=1, repetition_penalty=1.0)
    (made,) = generate(network, [before], [6], draw_table([6], [0], 9), sampler, room.tokenizer.end)
    with torch.no_grad():
        tokens, codes = network(torch.cat([before, made], 1)[None])
    ahead = slice(before.shape[1] - 1, -1)
    assert tokens[0, ahead].argmax(-1).equal(made[0])
    audio = made[1:-1].any(0)
    drawn = slice(1, None) if network.code_in_token else slice(None)
    assert codes[0, ahead].argmax(-1).T[drawn, audio].equal(made[1:][drawn, audio])


def test_the_sampler_draws_from_the_nucleus_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)
    draws = torch.arange(1000) / 1000
    ids = Sampler(temperature=1.0, top_p=0.85)(logits, draws, None)
    assert torch.bincount(ids, minlength=4).tolist() == pytest.approx([625, 375, 0, 0], abs=1)
    assert Sampler(top_k=1)(logits, draws, None).eq(0).all()
    recent = torch.zeros(1000, 1, dtype=torch.long)
    assert Sampler(top_k=1, repetition_penalty=2.0)(logits, draws, recent).eq(1).all()


def test_what_cannot_be_is_told() -> None:
    room = family()
    network = room.network()
    with pytest.raises(DataError, match=r"song 歌0 needs .* positions"):
        room.collate(songs_of(room, 5000), training=True)
    with pytest.raises(DataError, match="prompt 1 needs"):
        room.generate(network, [Prompt(lyrics=TEXT, seconds=300)], Sampling())
    with pytest.raises(DataError, match="prompt 1 names a speaker"):
        room.generate(network, [Prompt(lyrics=TEXT, speaker="花子")], Sampling())


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


def test_texts_are_cleaned_as_upstream_cleans_them() -> None:
    assert clean("  さくら\n さくら 🎵 ‘花’,,, \t") == "さくら さくら  '花', ".strip()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_saved_is_a_release_again(version: str, tmp_path: Path) -> None:
    room = family(version)
    network = room.network()
    changed = torch.ones_like(network.output.weight)
    folder = tmp_path / "公開"
    room.save(network, folder, {"output.weight": changed})
    _released(folder, version)
    back = family(version, f"file://{folder}").network()
    assert back.output.weight.equal(changed)
    assert back.norm.weight.equal(network.norm.weight) and back.semantic != network.semantic
    state = torch.load(folder / "model.pth", weights_only=True)
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, folder / "model.pth")
    assert family(version, f"file://{folder}/model.pth").network().output.weight.equal(changed)


def test_a_wrong_release_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    room = family("1.5")
    room.save(room.network(), tmp_path, {})
    _released(tmp_path)
    with pytest.raises(UtaforgeError, match=r"has no tokenizer.tiktoken"):
        family("1.5", f"file://{tmp_path}").network()
    _released(tmp_path, "1.4")
    with pytest.raises(UtaforgeError, match=r"write model.version: '1.4'"):
        family("1.5", f"file://{tmp_path}").network()
    _released(tmp_path, "1.5")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    del state["norm.weight"]
    torch.save({**state, "歌.weight": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(UtaforgeError, match=r"missing: norm.weight\n  unexpected: 歌.weight"):
        family("1.5", f"file://{tmp_path}").network()
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))
    with pytest.raises(UtaforgeError, match="tie_word_embeddings is True"):
        family("1.5", f"file://{tmp_path}").network()


def test_adapters_go_to_upstreams_format_and_back(tmp_path: Path) -> None:
    adapted = _adapted()
    adapted.save_pretrained(str(tmp_path))
    export_adapter(tmp_path, tmp_path / "lora.ckpt")
    state = torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]
    assert state["model.embeddings.lora_A"].shape == (8, Bytes.least("1.5"))
    assert state["model.fast_layers.0.attention.wqkv.lora_B"].shape == (128, 8)
    back = from_upstream({**state, "model.norm.weight": torch.zeros(1)})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert back.keys() == saved.keys() and all(back[name].equal(saved[name]) for name in saved)
    assert not set_peft_model_state_dict(adapted, back).unexpected_keys


def test_rank_stabilised_adapters_are_scaled_for_upstream_and_dora_is_refused(tmp_path: Path) -> None:
    for folder, options in ((tmp_path / "rs", {"use_rslora": True}), (tmp_path / "dora", {"use_dora": True})):
        _adapted(targets=["wo"], **options).save_pretrained(str(folder))
    export_adapter(tmp_path / "rs", tmp_path / "lora.ckpt")
    state = torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]
    saved = load_file(tmp_path / "rs" / "adapter_model.safetensors")[
        "base_model.model.layers.0.attention.wo.lora_B.weight"
    ]
    torch.testing.assert_close(state["model.layers.0.attention.wo.lora_B"], saved * 8**0.5)
    with pytest.raises(UtaforgeError, match="has no place in fish-speech's adapter format"):
        export_adapter(tmp_path / "dora", tmp_path / "lora.ckpt")


def test_packed_data_is_read_whether_numbers_are_packed_or_not_and_damage_is_told(tmp_path: Path) -> None:
    packed = _message(3, _message(1, bytes([5, 0xE7, 7]))) + _message(3, b"\x08\x06\x08\x01")
    group = _message(2, "花子".encode()) + _message(4, _message(1, TEXT.encode()) + packed) + b"\x4d\0\0\0\0"
    whole = len(group).to_bytes(4, "little") + group
    file = tmp_path / "00000000.protos"
    file.write_bytes(whole * 2)
    first, second = read_protos(file)
    assert first.name == second.name == "花子" and first.source == ""
    assert first.sentences[0].texts == [TEXT]
    assert first.sentences[0].codes.tolist() == [[5, 999], [6, 1]]
    for damaged in (whole[:-1], whole[:3], len(b"\x0b").to_bytes(4, "little") + b"\x0b"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is no \.protos file, or damaged"):
            list(read_protos(file))


def _released(folder: Path, version: str = "") -> None:
    """Make a release of saved random weights, with the tokenizer of ``version``."""
    told = json.loads((folder / "config.json").read_text())
    told.pop(BYTES, None)
    (folder / "config.json").write_text(json.dumps(told))
    if version == "1.5":
        lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
        (folder / "tokenizer.tiktoken").write_text("\n".join(lines))
    if version == "1.4":
        tokenizer = word_tokenizer(["歌", "<unk>"], "<unk>")
        tokenizer.add_special_tokens(["<|im_end|>", "<|semantic|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        assert Json(folder / "tokenizer.json")("歌<|im_end|>") == [0, 2]


def _adapted(targets: list[str] | None = None, **options: bool) -> PeftModel:
    chosen = targets or list(FISH_SPEECH.presets["fish-speech/r8a16"].targets)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=chosen, init_lora_weights=False, **options)  # type: ignore[arg-type]
    adapted = get_peft_model(family().network(), config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _message(field: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([field << 3 | 2, len(content)]) + content

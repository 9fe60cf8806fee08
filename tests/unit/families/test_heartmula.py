"""The HeartMuLa family on its tiny random network. Its numbers are in tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.families.conftest import examples, random_codes, sampling, word_tokenizer
from trainer.adapt import apply
from trainer.families.base import Batch, Example
from trainer.families.heartmula.family import HeartMuLaFamily
from trainer.families.heartmula.generate import generate, sampler
from trainer.families.heartmula.network import HeartMuLaNetwork
from trainer.families.heartmula.objective import song_rows
from trainer.families.heartmula.spec import HeartMuLa
from trainer.families.heartmula.weights import open_release
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.family import lora_parameters
from trainer.spec.job import Prompt
from trainer.spec.model import Lora

TEXTS = (
    ("女性ボーカル, バラード", "[Verse]\nさくら さくら"),
    ("Fast 祭り", "[Chorus]\nわっしょい\nわっしょい"),
    ("", ""),
)
BEGIN, END, STOP = 256, 257, 1025


def family_of(pretrained: str = "random:tiny", **options) -> HeartMuLaFamily:
    return HeartMuLaFamily(HeartMuLa(family="heartmula", pretrained=pretrained, **options))


@pytest.fixture(scope="module")
def family() -> HeartMuLaFamily:
    return family_of(cfg_dropout=0.5, depth_fraction=0.25)


@pytest.fixture(scope="module")
def network(family: HeartMuLaFamily) -> HeartMuLaNetwork:
    return family.network().eval()


def songs_of(family: HeartMuLaFamily, *lengths: int) -> list[Example]:
    texts = ({"tags": tags, "lyrics": lyrics} for tags, lyrics in TEXTS)
    return examples(family, random_codes(8, 1024, lengths), *texts)


def prompts(*seconds: float, seed: int = 0) -> list[Prompt]:
    texts = (TEXTS[i % len(TEXTS)] for i in range(len(seconds)))
    return [
        Prompt(tags=tags, lyrics=lyrics, seconds=s, seed=seed) for (tags, lyrics), s in zip(texts, seconds, strict=True)
    ]


def test_the_released_size_has_the_facts_parameters_and_no_buffers() -> None:
    with torch.device("meta"):
        network = HeartMuLaNetwork(open_release("random:full").config)
    assert sum(p.numel() for p in network.parameters()) == FAMILIES["heartmula"].dims.parameters == 3_938_113_536
    assert not list(network.buffers())
    method = Lora(type="lora", preset="heartmula/all-linear")
    adapted = apply(network, method, FAMILIES["heartmula"])
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    spec = FAMILIES["heartmula"]
    assert trained == lora_parameters(spec, spec.dims, method.rank, spec.targets(method)) == 26_968_064


def test_a_song_is_tags_slot_lyrics_frames_and_the_end(family: HeartMuLaFamily) -> None:
    (song,) = songs_of(family, 3)
    batch = family.collate([song], training=False)
    tokens, mask, slot = batch.tensors["tokens"][0], batch.tensors["mask"][0], int(batch.tensors["slot"])
    tags = [BEGIN, *"<tag>女性ボーカル, バラード</tag>".encode(), END]
    lyrics = [BEGIN, *"[verse]\nさくら さくら".encode(), END]
    assert tokens[:-4, -1].tolist() == [*tags, 0, *lyrics]
    assert slot == len(tags)
    assert mask[:-4].sum(0).tolist() == [0] * 8 + [len(tags) + 1 + len(lyrics)]
    assert tokens[-4:-1, :8].T.tolist() == song.arrays["codes"].tolist()
    assert tokens[-1, :8].tolist() == [STOP] * 8
    assert mask[-4:].sum(0).tolist() == [4] * 8 + [0]
    assert batch.counts == {"ce0": 4, "ce_k": 28}
    assert batch.frames == 3


def test_a_song_that_goes_on_has_no_end() -> None:
    prompt, codes = torch.zeros(3, 9, dtype=torch.long), torch.ones(8, 2, dtype=torch.long)
    for end, last in ((None, 1), (STOP, STOP)):
        tokens, mask = song_rows(prompt, codes, end)
        assert len(tokens) == 5 + (end is not None)
        assert tokens[-1].tolist() == [last] * 8 + [0]
        assert mask[-1].tolist() == [True] * 8 + [False]


def test_tags_that_are_marked_already_are_not_marked_again(family: HeartMuLaFamily) -> None:
    (plain,) = songs_of(family, 2)
    marked = Example("", plain.arrays, {**plain.text, "tags": f"<tag>{plain.text['tags']}</tag>"}, 0)
    first, second = (family.collate([song], training=False).tensors["tokens"] for song in (plain, marked))
    assert torch.equal(first, second)


def test_loss_does_not_depend_on_padding(family: HeartMuLaFamily, network: HeartMuLaNetwork) -> None:
    songs = songs_of(family, 31, 7, 18)
    together = family.sums(network, family.collate(songs, training=False))
    apart = [family.sums(network, family.collate([song], training=False)) for song in songs]
    for term in family.terms:
        assert torch.allclose(together[term], torch.stack([sums[term] for sums in apart]).sum(), rtol=1e-5)


def test_draws_follow_from_the_seed_alone_and_only_in_training(family: HeartMuLaFamily) -> None:
    songs = songs_of(family, *[16] * 12)

    def drawn(batch: Batch) -> list[tuple[bool, list[bool]]]:
        frames = batch.tensors["mask"][..., 0]
        return [
            (bool(dropped), depth[valid].tolist())
            for dropped, depth, valid in zip(
                batch.tensors["unconditional"], batch.tensors["depth"], frames, strict=True
            )
        ]

    first, again, reverse = (drawn(family.collate(s, training=True)) for s in (songs, songs, songs[::-1]))
    assert first == again == reverse[::-1]
    assert 0 < sum(dropped for dropped, _ in first) < 12
    assert {sum(depth) for _, depth in first} == {4}
    assert len({tuple(depth) for _, depth in first}) > 6
    assert all(not dropped and all(depth) for dropped, depth in drawn(family.collate(songs, training=False)))


def test_the_depth_decoder_counts_its_own_frames(family: HeartMuLaFamily, network: HeartMuLaNetwork) -> None:
    batch = family.collate(songs_of(family, 15, 31), training=True)
    whole = family.collate(songs_of(family, 15, 31), training=False)
    assert batch.counts == {"ce0": 16 + 32, "ce_k": 7 * (4 + 8)}
    batch.tensors["unconditional"][:] = False
    part, full = (family.sums(network, b) for b in (batch, whole))
    assert torch.equal(part["ce0"], full["ce0"])
    mean = {name: sums["ce_k"] / b.counts["ce_k"] for name, sums, b in (("part", part, batch), ("full", full, whole))}
    assert mean["part"] != mean["full"]
    assert torch.allclose(mean["part"], mean["full"], rtol=0.1)


def test_a_dropped_text_says_nothing_but_its_length(family: HeartMuLaFamily, network: HeartMuLaNetwork) -> None:
    texts = [{"tags": tags, "lyrics": "うた"} for tags in ("静か", "激烈")]
    songs = examples(family, random_codes(8, 1024, [9]) * 2, *texts)
    losses = {}
    for dropped in (False, True):
        batches = [family.collate([song], training=False) for song in songs]
        for batch in batches:
            batch.tensors["unconditional"][:] = dropped
        losses[dropped] = [float(family.sums(network, batch)["ce0"].detach()) for batch in batches]
    assert losses[True][0] == losses[True][1]
    assert losses[False][0] != losses[False][1]


def test_every_parameter_learns_also_with_activations_recomputed(family: HeartMuLaFamily) -> None:
    batch = family.collate(songs_of(family, 9, 5), training=True)
    gradients = []
    for recompute in (False, True):
        network = family.network().train()
        if recompute:
            network.gradient_checkpointing_enable()
        sum(family.sums(network, batch).values()).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_an_adapter_changes_nothing_before_training_and_reaches_both_stacks(
    family: HeartMuLaFamily, network: HeartMuLaNetwork
) -> None:
    adapted = apply(family.network(), Lora(type="lora", preset="heartmula/all-linear"), FAMILIES["heartmula"]).eval()
    batch = family.collate(songs_of(family, 6), training=False)
    base, sums = family.sums(network, batch), family.sums(adapted, batch)
    assert all(torch.equal(base[term], sums[term]) for term in base)
    (sums["ce0"] + sums["ce_k"]).backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    for stack in ("backbone", "decoder"):
        assert sum(f".{stack}.layers." in name for name in trained) == 2 * 2 * 7


def greedy(
    family: HeartMuLaFamily, network: HeartMuLaNetwork, song: np.ndarray, text: tuple[str, str], guidance: float
):
    """The best code of every frame and codebook, teacher-forced through two whole passes."""
    batch = family.collate([Example("", {"codes": song}, {"tags": text[0], "lyrics": text[1]}, 0)], training=False)
    passes: list[Tensor] = []
    for dropped in (False, True):
        batch.tensors["unconditional"][:] = dropped
        tokens, mask, unconditional, slot = (batch.tensors[n] for n in ("tokens", "mask", "unconditional", "slot"))
        hidden = network.hidden(network.embed(tokens, mask, unconditional, slot), mask)[0]
        context = hidden[-song.shape[1] - 2 : -2]
        codes = torch.from_numpy(song.astype(np.int64)).T
        inner = network.depth(context, codes[:, :-1])
        logits = [network.logits(0, context), *(network.logits(k, inner[:, k]) for k in range(1, 8))]
        passes.append(torch.stack(logits))
    return (passes[1] + guidance * (passes[0] - passes[1])).argmax(-1)


@pytest.mark.parametrize("guidance", [1, 2.5])
@torch.no_grad()
def test_greedy_generation_is_what_teacher_forcing_predicts(
    family: HeartMuLaFamily, network: HeartMuLaNetwork, guidance: float
) -> None:
    songs = family.generate(network, prompts(0.4, 0.8, 1.2), sampling("heartmula", guidance=guidance, top_k=1))
    assert all(song["codes"].shape[1] > 1 for song in songs)
    for text, song in zip(TEXTS, songs, strict=True):
        wanted = greedy(family, network, song["codes"], text, guidance).numpy()
        assert np.array_equal(np.where(wanted < family.vocabulary, wanted, 0), song["codes"])


def test_a_prompts_song_depends_on_its_seed_and_not_on_its_company(
    family: HeartMuLaFamily, network: HeartMuLaNetwork
) -> None:
    asked = prompts(1, 0.7, 0.4, seed=7)
    together = family.generate(network, asked, sampling("heartmula"))
    for prompt, song in zip(asked, together, strict=True):
        (alone,) = family.generate(network, [prompt], sampling("heartmula"))
        assert np.array_equal(alone["codes"], song["codes"])
        assert song["codes"].max() < family.vocabulary
    (other,) = family.generate(network, prompts(1, seed=8), sampling("heartmula"))
    assert not np.array_equal(other["codes"], together[0]["codes"])


def test_a_song_ends_before_its_first_frame_with_an_end_but_has_one(network: HeartMuLaNetwork) -> None:
    ends = torch.tensor([3, 0, 9, 1])

    def take(frame: int, book: int, logits: Tensor) -> Tensor:
        return torch.where((ends == frame) & (book == 5), STOP + 1, torch.full_like(ends, book))

    prompt = torch.zeros(3, 9, dtype=torch.long)
    songs = generate(network, [prompt] * 4, [1] * 4, [6, 6, 6, 6], 1, take)
    assert [song.shape[1] for song in songs] == [3, 6, 6, 1]
    assert songs[1][:, 0].tolist() == [0, 1, 2, 3, 4, STOP + 1, 6, 7]


def test_sampling_follows_the_distribution_and_top_k() -> None:
    logits = torch.linspace(0, 3, 256)
    take = sampler([3], 4000, 1, temperature=0.02, top_k=4)
    codes = np.array([int(take(frame, 0, logits[None])) for frame in range(4000)])
    wanted = (logits[252:].double() / 0.02).softmax(-1).numpy()
    assert codes.min() == 252
    assert np.abs(np.bincount(codes, minlength=256)[252:] / len(codes) - wanted).max() < 0.02


def test_a_song_beyond_the_positions_is_named(family: HeartMuLaFamily) -> None:
    long = Example("長い曲", {"codes": np.zeros((8, 8150), np.uint16)}, {"tags": "", "lyrics": "ラ" * 20}, 0)
    with pytest.raises(
        DataError, match=r"song 長い曲 has 76 rows of text and 8150 frames \(652\.0 s\).*for 8115 frames"
    ):
        family.collate([long], training=True)
    with pytest.raises(DataError, match="prompt 2 has"):
        family.generate(torch.nn.Module(), prompts(1, 700), sampling("heartmula"))


def released(folder: Path, network: HeartMuLaNetwork, family: HeartMuLaFamily) -> Path:
    family.save(network, folder, {"muq_linear.bias": torch.ones(64)})
    return folder


def test_what_is_saved_is_read_back(tmp_path: Path, family: HeartMuLaFamily, network: HeartMuLaNetwork) -> None:
    again = family_of(f"file://{released(tmp_path / '歌', network, family)}")
    read, state = again.network().state_dict(), network.state_dict()
    assert again.config == family.config
    assert torch.equal(read.pop("muq_linear.bias"), torch.ones(64))
    assert all(torch.equal(read[name], state[name]) for name in read)
    batches = [f.collate(songs_of(family, 3), training=False).tensors["tokens"] for f in (family, again)]
    assert torch.equal(*batches)


def test_foreign_weights_are_refused_and_all_keys_listed(
    tmp_path: Path, family: HeartMuLaFamily, network: HeartMuLaNetwork
) -> None:
    folder = released(tmp_path, network, family)
    state = load_file(folder / "model.safetensors")
    state["拍子"] = state.pop("audio_head")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UtaforgeError, match=r"(?s)2 differences.*missing: audio_head.*unexpected: 拍子"):
        family_of(f"file://{folder}").network()
    (folder / "config.json").write_text(json.dumps({"model_type": "heartmula", "backbone_flavor": "llama-70B"}))
    with pytest.raises(UtaforgeError, match=r"llama-70B.*not a HeartMuLa of llama-3B"):
        family_of(f"file://{folder}").network()


def test_the_tokenizer_is_the_releases_or_the_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "HeartMuLa-oss-3B"
    folder.mkdir()
    config = {"model_type": "heartmula", "backbone_flavor": "llama-3B", "decoder_flavor": "llama-300M"}
    (folder / "config.json").write_text(json.dumps(config))
    song = [Example("", {"codes": np.zeros((8, 1), np.uint16)}, {"tags": "", "lyrics": "桜 歌 SAKURA"}, 0)]

    def lyrics(**options) -> list[int]:
        tensors = family_of(f"file://{folder}", **options).collate(song, training=False).tensors
        return tensors["tokens"][0, int(tensors["slot"]) + 1 : -2, -1].tolist()

    with pytest.raises(UtaforgeError, match=r"nor the folder above it has tokenizer\.json") as error:
        lyrics()
    assert "HeartMuLaGen" in error.value.cure
    word_tokenizer(["?", "桜", "歌", "sakura"], "?").save(str(tmp_path / "tokenizer.json"))
    assert lyrics() == [128_000, 1, 2, 3, 128_001]
    (tmp_path / "gen_config.json").write_text(json.dumps({"text_bos_id": 7, "text_eos_id": 8, "audio_eos_id": 8193}))
    assert lyrics() == [7, 1, 2, 3, 8]
    other = tmp_path / "別の.json"
    word_tokenizer(["?", "歌", "桜"], "?").save(str(other))
    assert lyrics(tokenizer=f"file://{other}") == [7, 2, 1, 0, 8]
    other.write_text("{}")
    with pytest.raises(UtaforgeError, match=r"別の\.json is not a tokenizer"):
        lyrics(tokenizer=f"file://{other}")

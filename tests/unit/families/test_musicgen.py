"""The MusicGen family on its tiny random network."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.unit.families.conftest import examples, random_codes, sampling
from trainer.families import cross_entropy
from trainer.families.base import Example
from trainer.families.cross_entropy import labelled
from trainer.families.musicgen import objective
from trainer.families.musicgen.family import MusicGenFamily
from trainer.families.musicgen.generate import generate
from trainer.families.musicgen.network import MusicGenNetwork
from trainer.families.musicgen.spec import MusicGen
from trainer.families.musicgen.weights import open_release
from trainer.spec.errors import DataError
from trainer.spec.job import Prompt

TAGS = ("gentle, slow, 子守唄", "速い 祭り, bright", "")
GREEDY = sampling("musicgen", guidance=1, top_k=1)


@pytest.fixture(scope="module")
def family() -> MusicGenFamily:
    return MusicGenFamily(MusicGen(family="musicgen", pretrained="random:tiny", cfg_dropout=0.5))


@pytest.fixture(scope="module")
def network(family: MusicGenFamily) -> MusicGenNetwork:
    return family.network().eval()


def songs_of(family: MusicGenFamily, *lengths: int) -> list[Example]:
    return examples(family, random_codes(4, 256, lengths), *({"tags": tags} for tags in TAGS))


def test_loss_does_not_depend_on_padding(family: MusicGenFamily, network: MusicGenNetwork) -> None:
    songs = songs_of(family, 31, 7, 18)
    together = family.sums(network, batch := family.collate(songs, training=False))
    apart = [family.sums(network, family.collate([song], training=False)) for song in songs]
    assert batch.counts["ce"] == 4 * (31 + 7 + 18)
    for term in family.terms:
        assert torch.allclose(together[term], torch.stack([sums[term] for sums in apart]).sum(), rtol=1e-5)
    assert torch.allclose(together["ce"], torch.stack([together[f"ce/{k}"] for k in range(4)]).sum())


def test_chunked_loss_has_the_gradient_of_the_whole(network: MusicGenNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(2, 25, 64, generator=torch.Generator().manual_seed(0))
    _, labels = objective.delay(torch.randint(256, (2, 4, 22)), torch.tensor([22, 9]), pad=256)
    gradients = []
    for chunk in (cross_entropy.CHUNK_BYTES, 5 * 4 * 256):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
        leaf = hidden.clone().requires_grad_()
        heads = network.decoder.lm_heads
        objective.cross_entropy_sums(leaf, map(labelled, labels.unbind(1)), heads, 256).sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-5)


def test_dropped_descriptions_follow_from_the_seed_alone_and_only_in_training(family: MusicGenFamily) -> None:
    songs = songs_of(family, *[5] * 12)
    heard = family.collate(songs, training=False).tensors["text_mask"].any(1)
    first, second = (family.collate(songs, training=True).tensors["text_mask"].any(1) for _ in range(2))
    reverse = family.collate(songs[::-1], training=True).tensors["text_mask"].any(1).flip(0)
    assert torch.equal(first, second)
    assert torch.equal(first, reverse)
    assert heard.tolist() == [True, True, False] * 4
    assert 0 < first.sum() < heard.sum()


def test_a_dropped_description_leaves_loss_and_gradients_finite(family: MusicGenFamily) -> None:
    network = family.network().train()
    batch = family.collate(songs_of(family, 9, 9, 9), training=False)
    batch.tensors["text_mask"][:] = False
    family.sums(network, batch)["ce"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_song_beyond_the_positions_is_named(family: MusicGenFamily) -> None:
    with pytest.raises(DataError, match=r"song 歌0 has 2046 frames \(40.9 s\), the network has positions for 2045"):
        family.collate(songs_of(family, 2046), training=True)


def test_dropout_is_the_jobs() -> None:
    family = MusicGenFamily(MusicGen(family="musicgen", pretrained="random:tiny", dropout=0.25))
    assert {layer.dropout for layer in family.network().decoder.model.decoder.layers} == {0.25}


def test_greedy_generation_is_what_teacher_forcing_predicts(family: MusicGenFamily, network: MusicGenNetwork) -> None:
    prompts = [Prompt(tags=tags, seconds=0.4 + 0.2 * i, seed=i) for i, tags in enumerate(TAGS)]
    songs = [song["codes"] for song in family.generate(network, prompts, GREEDY)]
    assert [song.shape for song in songs] == [(4, 20), (4, 30), (4, 40)]
    for prompt, song in zip(prompts, songs, strict=True):
        (condition,) = family.conditions([{"tags": prompt.tags}])
        batch = family.collate([Example("", {"codes": song, **condition}, {}, 0)], training=False)
        ids, labels = objective.delay(batch.tensors["codes"], batch.tensors["length"], network.pad)
        with torch.no_grad():
            best = network(ids, batch.tensors["text_hidden"], batch.tensors["text_mask"]).argmax(-1)
        assert torch.equal(best[labels >= 0], labels[labels >= 0])


def test_guidance_is_the_difference_of_two_whole_passes(family: MusicGenFamily, network: MusicGenNetwork) -> None:
    (song,) = family.generate(network, [Prompt(tags=TAGS[0], seconds=0.3)], sampling("musicgen", guidance=4, top_k=1))
    (condition,) = family.conditions([{"tags": TAGS[0]}])
    batch = family.collate([Example("", {**song, **condition}, {}, 0)], training=False)
    hidden, mask = batch.tensors["text_hidden"], batch.tensors["text_mask"]
    ids, labels = objective.delay(batch.tensors["codes"], batch.tensors["length"], network.pad)
    with torch.no_grad():
        with_text, without = network(ids, hidden, mask), network(ids, hidden, mask & False)
    best = (without + 4 * (with_text - without)).argmax(-1)
    assert torch.equal(best[labels >= 0], labels[labels >= 0])


def test_a_prompts_song_depends_on_its_seed_and_not_on_its_company(
    family: MusicGenFamily, network: MusicGenNetwork
) -> None:
    prompts = [Prompt(tags=tags, seconds=1 - 0.3 * i, seed=7) for i, tags in enumerate(TAGS)]
    asked = sampling("musicgen", temperature=0.9, top_k=50)
    together = family.generate(network, prompts, asked)
    for prompt, song in zip(prompts, together, strict=True):
        (alone,) = family.generate(network, [prompt], asked)
        assert np.array_equal(alone["codes"], song["codes"])
    other = family.generate(network, [prompts[0].model_copy(update={"seed": 8})], asked)
    assert not np.array_equal(other[0]["codes"], together[0]["codes"])


def test_sampling_follows_the_distribution_and_top_k() -> None:
    class Fixed(MusicGenNetwork):
        def forward(self, ids, *_, **__):
            return self.logits.expand(len(ids), 4, 1, -1)

    network = Fixed(open_release("random:tiny").decoder_config(dropout=0.0), 64)
    network.logits = torch.linspace(0, 3, 256)
    text = torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.bool)
    (codes,) = generate(network, [5000], [3], *text, guidance=1, temperature=0.02, top_k=4)
    found = np.bincount(codes.ravel(), minlength=256)[252:] / codes.size
    wanted = functional.softmax(network.logits[252:].double() / 0.02, -1).numpy()
    assert codes.min() == 252
    assert np.abs(found - wanted).max() < 0.01


def test_the_full_size_has_the_released_number_of_parameters() -> None:
    full = MusicGenFamily(MusicGen(family="musicgen", pretrained="random:full"))
    with torch.device("meta"):
        network = full.network()
    assert sum(parameter.numel() for parameter in network.decoder.parameters()) == 3_255_382_016
    assert all(value.is_meta for value in network.state_dict().values())

"""What holds for every family, with its own codec and preset: adapters change nothing at first, and merge exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from trainer.adapt import apply
from trainer.codecs import open_codec
from trainer.families import FAMILY_NAMES, Batch, Example, Family, open_family
from trainer.spec.errors import UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.job import Prompt, Sampling
from trainer.spec.model import Lora, Model

TEXT = {"tags": "祭り, koto, female vocal", "lyrics": "[verse] s a k u r a . [chorus] h a n a"}
SECONDS = 4.0
DECODED_AS = {"musicgen": "encodec"}


@dataclass(frozen=True)
class Subject:
    """A tiny family with a batch of its own."""

    name: str
    family: Family
    batch: Batch

    def sums(self, network: nn.Module) -> torch.Tensor:
        """Loss sums in evaluation, which draws always the same."""
        network.eval()
        with torch.no_grad():
            sums = self.family.sums(network, self.batch)
        return torch.stack([sums[term].double() for term in sorted(self.family.terms)])

    def adapted(self) -> nn.Module:
        """The network with the family's own preset."""
        preset = next(iter(FAMILIES[self.name].presets))
        network = apply(self.family.network(), Lora(type="lora", preset=preset), FAMILIES[self.name])
        return network


def model(name: str, pretrained: str = "random:tiny") -> Model:
    told = {"family": name, "pretrained": pretrained}
    if name in DECODED_AS:
        told["codec"] = {"name": DECODED_AS[name]}
    return TypeAdapter(Model).validate_python(told)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    name = request.param
    family, codec = open_family(model(name)), open_codec(model(name))
    noise = np.random.default_rng(0).normal(0, 0.1, (codec.channels, round(SECONDS * codec.sample_rate)))
    (conditions,) = family.conditions([TEXT])
    examples = [
        Example(f"歌{i}", {**codec.encode(noise.astype(np.float32) / (i + 1)), **conditions}, TEXT, seed=i)
        for i in range(2)
    ]
    yield Subject(name, family, family.collate(examples, training=False))


def test_an_adapter_changes_nothing_before_it_is_trained(subject: Subject) -> None:
    assert torch.allclose(subject.sums(subject.adapted()), subject.sums(subject.family.network()), rtol=1e-6)


def test_merged_weights_in_upstreams_format_compute_what_the_adapter_computes(subject: Subject, tmp_path: Path) -> None:
    adapted = subject.adapted()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    before = subject.sums(subject.family.network())
    wanted = subject.sums(adapted)
    assert not torch.allclose(wanted, before, rtol=1e-4)
    subject.family.save(adapted.merge_and_unload(), tmp_path / "合成", {})
    url = f"file://{tmp_path}/合成"
    if subject.name == "fish_speech":
        pytest.skip("a release without a tokenizer file is refused, and random weights have none")
    merged = open_family(model(subject.name, url)).network()
    assert torch.allclose(subject.sums(merged), wanted, rtol=1e-5)


def test_a_checkpoint_of_another_family_is_refused(subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "壊れた"
    subject.family.save(subject.family.network(), folder, {})
    other = next(name for name in FAMILY_NAMES if name != subject.name)
    with pytest.raises(UtaforgeError):
        open_family(model(other, f"file://{folder}")).network()


def test_songs_follow_from_prompt_and_seed(subject: Subject) -> None:
    network = subject.family.network().eval()
    prompts = [Prompt(**{k: v for k, v in TEXT.items() if k in FAMILIES[subject.name].prompt_fields}, seconds=1, seed=s)
               for s in (1, 2)]  # fmt: skip
    sampling = Sampling(guidance=1.5, top_k=20)
    together = subject.family.generate(network, prompts, sampling)
    (alone,) = subject.family.generate(network, prompts[1:], sampling)
    assert alone.keys() == together[1].keys()
    for name, array in alone.items():
        assert array.shape == together[1][name].shape
        assert np.allclose(array.astype(np.float64), together[1][name].astype(np.float64), atol=1e-3)
    audio = open_codec(model(subject.name)).decode(alone)
    assert np.isfinite(audio).all()

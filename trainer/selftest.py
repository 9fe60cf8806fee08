"""Self-tests on somebody's own weights and songs: ``python -m trainer.selftest WEIGHTS_URL DATASET_URL``.

They find what would otherwise show after a night: weights of another model, codes of another codec, an adapter that
changes the network before it is trained or that does not survive being merged. ``utaforge doctor --model`` runs them.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from trainer.adapt import apply
from trainer.data.dataset import Dataset
from trainer.families import Batch, Example, Family, open_family
from trainer.spec.errors import UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.model import Lora, Model

SONGS, SECONDS = 2, 10.0
"""What the tests compute on: the beginnings of the first songs."""
SAME, CLOSE = 1e-6, 1e-5
"""Relative differences of the loss sums: before training, and after merging (fp32)."""
DISTURBANCE = 0.1
"""Standard deviation of what stands in for training."""


class Check(NamedTuple):
    """What one test found."""

    name: str
    ok: bool
    found: str


def selftest(weights: str, dataset: str) -> Iterator[Check]:
    """Every test, one after the other; the family is the one that the dataset was prepared for.

    Raises:
        UtaforgeError: the weights or the songs cannot be used at all, so that nothing else can be tested.
    """
    songs = Dataset.open(dataset)
    told = {"family": songs.format.family, "pretrained": weights, "codec": {"name": songs.format.codec}}
    family = open_family(TypeAdapter(Model).validate_python(told))
    songs.check_against(codebooks=family.codebooks, vocabulary=family.vocabulary, frame_rate=family.frame_rate)
    yield Check("songs", True, f"{len(songs.songs)}, every code within the vocabulary")
    network = family.network()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    yield Check("weights", True, f"{parameters:,} parameters of {songs.format.family}, every key in its place")
    batch = family.collate(_examples(songs), training=False)
    base = _sums(family, network, batch)
    yield Check("loss", bool(base.isfinite().all()), ", ".join(_means(family, batch, base)))
    spec = FAMILIES[songs.format.family]
    adapted = apply(network, Lora(type="lora", preset=next(iter(spec.presets))), spec)
    change = _difference(_sums(family, adapted, batch), base)
    yield Check("untrained adapter", change <= SAME, f"changes the loss by {change:.1e}, at most {SAME:.0e} is right")
    _disturb(adapted)
    trained = _sums(family, adapted, batch)
    error = _difference(_sums(family, adapted.merge_and_unload(), batch), trained)
    moved = _difference(trained, base)
    found = (
        f"differs from the adapter, which moved the loss by {moved:.1e}, by {error:.1e}; at most {CLOSE:.0e} is right"
    )
    yield Check("merged adapter", error <= CLOSE < moved, found)


def _examples(songs: Dataset) -> list[Example]:
    frames = round(SECONDS * songs.format.frame_rate)
    examples: list[Example] = []
    for name in songs.songs.ids[:SONGS]:
        song = songs.song(name)
        cut = {timed: song.arrays[timed][..., :frames] for timed in songs.format.timed}
        text = {"tags": song.tags, "lyrics": song.lyrics}
        examples.append(Example(song.id, {**song.arrays, **cut}, text, seed=0, ends=song.frames <= frames))
    return examples


@torch.no_grad()
def _sums(family: Family, network: nn.Module, batch: Batch) -> Tensor:
    sums = family.sums(network.eval(), batch)
    return torch.stack([sums[term].double() for term in family.terms])


def _means(family: Family, batch: Batch, sums: Tensor) -> Iterator[str]:
    for (term, weight), value in zip(family.terms.items(), sums.tolist(), strict=True):
        if weight:
            yield f"{term} {value / batch.counts[term]:.4f}"


def _difference(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@torch.no_grad()
def _disturb(network: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter += DISTURBANCE * torch.randn(parameter.shape, generator=draw)


def main(argv: Sequence[str] | None = None) -> int:
    """``WEIGHTS_URL DATASET_URL``; returns the exit status: 1 if a test fails."""
    weights, dataset = argv if argv is not None else sys.argv[1:]
    failed = 0
    try:
        for check in selftest(weights, dataset):
            failed += not check.ok
            sys.stdout.write(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}\n")
    except UtaforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

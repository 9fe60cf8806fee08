"""LoRA steps of every family beside a plain PEFT loop: ``python -m tests.bench.gpu [FAMILY…]``, one process.

On a GPU: networks of full size with random weights, and a file in ``results/`` for each kind of GPU and family. On a
CPU: tiny ones, and nothing is written. Needed are ``PACKAGES`` and what they bring along (numpy, tokenizers, PyYAML and
regex; pydantic and rich by way of transformers' typer); nothing of Ray, the store, the shards or the tracking.

Both sides train on the same songs. Ours is the engine on micro-batches of songs of similar length; the other one takes
the songs as they come, each batch padded to its longest, under autocast over weights of the same precision.

Tokens are frames × codebooks, padding not counted. MFU = 4·N·D ÷ (seconds · peak): ``D`` frames of audio without
padding, ``N`` parameters that a frame passes, each as often as it does (a depth decoder is passed once a code, what
reads the text hardly ever). 2·N·D operations lead forward and 2·N·D back; frozen weights have no gradients. N·D is
half of what a forward pass of each song alone multiplies and adds in matrix products with weights; attention among
positions and the adapter are left out, and so is whatever is computed twice.
"""

import argparse
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.adapt import apply, parameter_groups
from trainer.data.planner import Pool, in_order
from trainer.engine import DTYPES, Engine, Precision
from trainer.families import made_up, open_family
from trainer.families.base import Batch, Example, Family
from trainer.spec.families import FAMILIES, Model
from trainer.spec.job import BatchSongs, Train
from trainer.spec.model import Lora

from .figure import Figure, machine, save, show

PACKAGES = ("torch", "torchaudio", "transformers", "peft", "accelerate", "safetensors")
HOPPER = 989e12
PEAKS = {"H200": HOPPER, "H100": HOPPER, "A100": 312e12, "4090": 165e12, "T4": 65e12}
"""Dense operations a second in 16 bits with sums in fp32, by the makers' data sheets (H100, H200, A100: SXM)."""
LEAST_ON_HOPPER = 0.4
BYTES_PER_SONG = 32 << 30
"""Memory that a song of the greatest length is given at first."""
WEIGHTED = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
"""Products with weights; those of attention are batched."""
LEGEND = (
    "tokens: frames × codebooks, padding not counted; value: MFU = 4·N·D ÷ (seconds · peak) of ours, "
    "N: parameters that a frame passes, D: frames"
)
LR, CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class Place:
    """Where is measured, and how much.

    Attributes:
        device: the GPU, or the CPU.
        precision: of the computation.
        size: of the networks, ``random:…``.
        songs: of a step.
        together: songs of the greatest length that are computed at once.
        seconds: no song is longer, whatever the family allows.
        warmup: steps before the timed ones.
        steps: that are timed.
        peak: operations a second; None if unknown.
        told: of the GPU, for the result file.
    """

    device: torch.device
    precision: Precision
    size: str
    songs: int
    together: int
    seconds: float
    warmup: int
    steps: int
    peak: float | None
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    """What one side needed: seconds of each timed step, and bytes on the GPU at most."""

    seconds: list[float]
    bytes: int

    def tell(self, tokens: int, operations: float, place: Place) -> str:
        """For people."""
        share = self.mfu(operations, place)
        return ", ".join(
            (
                f"{tokens / median(self.seconds):,.0f} tokens/s",
                "MFU unknown" if share is None else f"MFU {share:.1%}",
                f"{self.bytes / 2**30:.1f} GiB" if self.bytes else "memory unknown",
            )
        )

    def mfu(self, operations: float, place: Place) -> float | None:
        """Share of the peak; None where that is unknown."""
        return operations / median(self.seconds) / place.peak if place.peak else None


def on_cpu() -> Place:
    """Tiny networks, and figures that say nothing."""
    return Place(torch.device("cpu"), "fp32", "tiny", 4, 2, 4.0, 1, 2, None, {})


def here() -> Place:
    """This machine's GPU, or its CPU."""
    if not torch.cuda.is_available():
        return on_cpu()
    card = torch.cuda.get_device_properties(0)
    told = {"gpu": card.name, "gpu_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    together = max(1, card.total_memory // BYTES_PER_SONG)
    return Place(torch.device("cuda", 0), precision, "full", 16, together, 240.0, 3, 10, peak_of(card.name), told)


def peak_of(gpu: str) -> float | None:
    """Of a GPU by its name; None if it is not known."""
    return next((peak for kind, peak in PEAKS.items() if re.search(rf"\b{kind}\b", gpu)), None)


def fitting(name: str, place: Place) -> Figure | None:
    """``measure`` with as many songs at once as there is memory for; None if one is too much."""
    while place.together:
        with suppress(torch.OutOfMemoryError):
            return measure(name, place)
        _free()
        place = replace(place, together=place.together // 2)
    return None


def measure(name: str, place: Place) -> Figure:
    """Both sides of one family, one after the other."""
    family = open_family(TypeAdapter(Model).validate_python({"family": name, "pretrained": f"random:{place.size}"}))
    method = Lora(type="lora", preset=next(iter(FAMILIES[name].presets)))
    songs = _songs(family, place)
    grouped = _grouped(songs, place.together)
    arrived = [songs[at : at + place.together] for at in range(0, len(songs), place.together)]
    frames = sum(_batch(family, [song]).frames for song in songs)
    operations = 4 * _weights_times_positions(family, songs, place)
    ours = _timed(_engine_steps(name, family, method, grouped, place), place)
    plain = _timed(_plain_steps(family, method, arrived, place), place)
    tokens = frames * max(family.codebooks, 1)
    ratio, passed = median(plain.seconds) / median(ours.seconds), operations / 4 / frames
    return Figure(
        name=f"gpu {name}",
        ours=f"{ours.tell(tokens, operations, place)}; N {passed / 1e9:.2g}e9, D {frames:,}",
        rival=f"{plain.tell(tokens, operations, place)}: we are {ratio:.2f} times as fast as plain PEFT",
        value=ours.mfu(operations, place),
        least=LEAST_ON_HOPPER if place.peak == HOPPER else None,
        details={
            "precision": place.precision,
            "preset": method.preset,
            "parameters_passed_by_a_frame": passed,
            "songs_at_once": place.together,
            "frames": [_length(song) for song in songs],
            "tokens": tokens,
            "peak": place.peak,
            "speed_ratio": ratio,
            "songs_in_micro_batches": [[len(micro) for micro in side] for side in (grouped, arrived)],
            "seconds": [ours.seconds, plain.seconds],
            "bytes": [ours.bytes, plain.bytes],
        },
    )


def _songs(family: Family, place: Place) -> list[Example]:
    """Songs of a quarter of the greatest length and more, always the same."""
    draw = np.random.default_rng(0)
    longest = round(min(family.segment_seconds, place.seconds) * family.frame_rate)
    lengths = draw.integers(longest // 4, longest, place.songs, endpoint=True).tolist()
    return made_up.songs(family, lengths, draw)


def _length(song: Example) -> int:
    return song.arrays["latents" if "latents" in song.arrays else "codes"].shape[-1]


def _grouped(songs: Sequence[Example], together: int) -> list[list[Example]]:
    """The planner's micro-batches."""
    by_id, lengths = {song.id: song for song in songs}, [_length(song) for song in songs]
    pool = Pool(list(by_id), lengths)
    batch = in_order([pool], micro_frames=together * max(lengths), segment_frames=max(lengths))
    return [[by_id[segment.song] for segment in micro] for micro in batch.micro]


def _batch(family: Family, songs: Sequence[Example]) -> Batch:
    return family.collate(songs, training=True)


def _network(family: Family, place: Place) -> nn.Module:
    """Made where it is used: the CPU may not have the memory, and draws slowly."""
    with place.device:
        return family.network()


@torch.no_grad()
def _weights_times_positions(family: Family, songs: Sequence[Example], place: Place) -> float:
    """N·D. In fp32 and with weights that want gradients, so that every product with a weight is an unbatched one."""
    network = _network(family, place).eval()
    with FlopCounterMode(display=False) as counter:
        for song in songs:
            family.sums(network, _batch(family, [song]).to(place.device))
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(product, 0) for product in WEIGHTED) / 2


def _engine_steps(
    name: str, family: Family, method: Lora, micro: Sequence[Sequence[Example]], place: Place
) -> Callable[[], object]:
    network = apply(_network(family, place), method, FAMILIES[name])
    section = Train(steps=1, batch=BatchSongs(songs=place.songs), clip=CLIP)
    groups = parameter_groups(network, method, section.optimizer)
    how: dict[str, Any] = {"strategy": "ddp", "precision": place.precision, "device": place.device}
    engine = Engine(network, family, section, groups, **how)
    batches = [(_batch(family, songs), 1.0) for songs in micro]
    return lambda: engine.step(batches, LR, seed=(engine.steps,))


def _plain_steps(
    family: Family, method: Lora, micro: Sequence[Sequence[Example]], place: Place
) -> Callable[[], object]:
    """The mean of the micro-batches' mean losses, as most recipes have it."""
    dtype, kind = DTYPES[place.precision], place.device.type
    targets = list(method.targets or ())
    config = LoraConfig(
        r=method.rank, lora_alpha=int(method.alpha), target_modules=targets, use_rslora=method.rslora, bias="none"
    )
    network = get_peft_model(_network(family, place).to(dtype), config).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    batches = [_batch(family, songs) for songs in micro]

    def step() -> None:
        for batch in batches:
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                sums = family.sums(network, batch.to(place.device))
            means = [weight * sums[term] / batch.counts[term] for term, weight in family.terms.items() if weight]
            scaler.scale(torch.stack(means).sum() / len(batches)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], object], place: Place) -> Side:
    """The last holder of ``step`` and all that it trains."""
    on_gpu = place.device.type == "cuda"
    _free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for _ in range(place.warmup + place.steps):
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return Side(seconds[place.warmup :], torch.cuda.max_memory_allocated() if on_gpu else 0)


def _free() -> None:
    """Networks hold on to themselves in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Measure, tell; on a GPU, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description="LoRA steps beside plain PEFT")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    names = parser.parse_args().families or FAMILIES
    if unknown := set(names) - set(FAMILIES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}")
    place, figures = here(), list[Figure]()
    for name in names:
        where = {**machine(PACKAGES), **place.told}
        figure = fitting(name, place)
        if figure is None:
            print(f"{name}: not even one song fits into this GPU")
            continue
        figures.append(figure)
        if "gpu" in where:
            kind = "-".join(re.findall("[a-z0-9]+", where["gpu"].lower()))
            save(f"gpu-{kind}-{name}", figure, where)
    show(figures, {**machine(PACKAGES), **place.told})
    print(LEGEND)


if __name__ == "__main__":
    main()

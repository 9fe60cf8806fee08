"""One rank of ``test_engine``: trains the tiny MusicGen in every way and writes what it saw as JSON."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer import engine as engine_module
from trainer.adapt import apply, parameter_groups
from trainer.engine import Engine, learning_rate, load_sharded, load_state, save_state
from trainer.families import open_family
from trainer.families.base import Batch, Example
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.families import FAMILIES
from trainer.spec.job import BatchSeconds, Prompt, Sampling, Train
from trainer.spec.model import Full, Lora, Optimizer, Schedule

STEPS, SAVED = 4, 2
LENGTHS = [(31,), (12, 9), (25, 7), (5, 5, 5), (18,)]
METHODS = {"lora": Lora(type="lora", rank=4, alpha=8, lora_plus=2), "full": Full(type="full")}
TRAIN = Train(
    steps=STEPS,
    batch=BatchSeconds(seconds=1),
    optimizer=Optimizer(lr=1e-2, weight_decay=0.1),
    schedule=Schedule(warmup=1),
    clip=0.3,
)
SAMPLING = Sampling(**FAMILIES["musicgen"].sampling)
FAMILY = open_family(MusicGen(family="musicgen", pretrained="random:tiny"))


def main(folder: Path, cases: list[str]) -> None:
    """Train by every case: ``strategy/method/precision``, and behind an ``@`` a state in ``folder`` to go on from."""
    engine_module.WHOLE_BELOW = 0  # else ZeRO-3 would leave this tiny network whole
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    seen = {case: run(case, folder) for case in cases}
    if dist.get_rank() == 0:
        (folder / f"seen-{dist.get_world_size()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def run(case: str, folder: Path) -> dict[str, Any]:
    """Losses, norms and final weights' sum of one case, from the start or from a saved state."""
    kind, _, resume = case.partition("@")
    strategy, method, precision = kind.split("/")
    state = None
    if resume:
        state = load_state(folder / resume) if resume.endswith(".safetensors") else load_sharded(folder / resume)
    network = FAMILY.network()
    if method == "lora":
        network = apply(network, METHODS["lora"], FAMILIES["musicgen"])
    groups = parameter_groups(network, METHODS[method], TRAIN.optimizer)
    options = {"strategy": strategy, "precision": precision, "device": torch.device("cpu"), "resume": state}
    engine = Engine(network, FAMILY, TRAIN, groups, **options)
    before = engine.evaluate(share(0))
    results, seconds = [], []
    for step in range(engine.steps + 1, STEPS + 1):
        start = time.perf_counter()
        results.append(engine.step(share(step), learning_rate(TRAIN, step), seed=(0, step)))
        seconds.append(time.perf_counter() - start)
        if step == SAVED and not resume:
            leave(engine, strategy, folder / f"{kind.replace('/', '-')}-{engine.world}")
    with engine.generating() as ready:
        songs = FAMILY.generate(ready, [Prompt(tags="祭り", seconds=0.2)], SAMPLING)
    final = engine.state()
    return {
        "before": before["loss"],
        "losses": [result.loss for result in results],
        "terms": [result.terms for result in results],
        "norms": [result.grad_norm for result in results],
        "skipped": [result.skipped for result in results],
        "tokens": [result.tokens for result in results],
        "after": engine.evaluate(share(0))["loss"],
        "weights": [float(values["param"].double().norm()) for values in final.tensors.values()],
        "moments": [float(values["exp_avg_sq"].double().sum()) for values in final.tensors.values()],
        "song": songs[0]["codes"].tolist(),
        "milliseconds": round(1000 * float(np.median(seconds)), 1),
    }


def leave(engine: Engine, strategy: str, path: Path) -> None:
    """Save the engine's state, in shards under ZeRO-3, else in one file."""
    if strategy == "zero3":
        engine.save_sharded(path)
        return
    state = engine.state()
    if engine.rank == 0:
        save_state(state, path.with_suffix(".safetensors"))


def share(step: int) -> list[tuple[Batch, float]]:
    """This rank's micro-batches of a step: five in all, of unequal lengths; a rank without its third repeats one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = [batch(step, index) for index in range(len(LENGTHS))]
    mine = [(micro, 1.0) for micro in batches[rank::world]]
    most = -(-len(batches) // world)
    return mine + [(batches[0], 0.0)] * (most - len(mine))


def batch(step: int, index: int) -> Batch:
    draw = np.random.default_rng((step, index))
    songs = [draw.integers(0, 64, (4, length)).astype(np.uint16) for length in LENGTHS[index]]
    conditions = FAMILY.conditions([{"tags": f"歌 {step} {i}"} for i in range(len(songs))])
    examples = [
        Example(f"{i}", {"codes": song, **condition}, {}, seed=step * 100 + i)
        for i, (song, condition) in enumerate(zip(songs, conditions, strict=True))
    ]
    return FAMILY.collate(examples, training=True)

"""One forward and backward pass of every family's ``random:tiny``, all weights trained.

One core computes, and the seconds are those that it does: so the figure holds on a busy machine too, and two cores have
no more to do. The result file has the clock's seconds as well.
"""

import time
from statistics import median

import torch
from pydantic import TypeAdapter

from trainer.families import open_family
from trainer.spec.families import FAMILIES, Model

from .figure import Figure
from .gpu import _batch, _songs, on_cpu

LIMIT_SECONDS = 2.0


def measure(repeats: int = 7) -> Figure:
    """``repeats`` passes of each, after a first one; the figure is the median of the slowest family."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns = {name: _turns(name, repeats) for name in FAMILIES}
    torch.set_num_threads(threads)
    medians = {name: median(seconds for seconds, _ in passes[1:]) for name, passes in turns.items()}
    return Figure(
        name="tiny",
        ours=", ".join(f"{name} {seconds:.3f}" for name, seconds in medians.items())
        + " s of one core, forward and backward",
        rival=f"{LIMIT_SECONDS:g} s each",
        value=max(medians.values()),
        most=LIMIT_SECONDS,
        details={
            "songs": on_cpu().songs,
            "core_seconds": {name: [seconds for seconds, _ in passes] for name, passes in turns.items()},
            "clock_seconds": {name: [seconds for _, seconds in passes] for name, passes in turns.items()},
        },
    )


def _turns(name: str, repeats: int) -> list[tuple[float, float]]:
    """Seconds of computing and of the clock of each pass over the same songs of at most 4 s."""
    family = open_family(TypeAdapter(Model).validate_python({"family": name, "pretrained": "random:tiny"}))
    batch = _batch(family, _songs(name, family, on_cpu()))
    network = family.network().train()
    turns: list[tuple[float, float]] = []
    for _ in range(1 + repeats):
        network.zero_grad()
        computing, clock = time.process_time(), time.perf_counter()
        sums = family.sums(network, batch)
        sum(sums[term] / batch.counts[term] * weight for term, weight in family.terms.items() if weight).backward()
        turns.append((time.process_time() - computing, time.perf_counter() - clock))
    return turns

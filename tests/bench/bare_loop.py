"""The rival of ``apparatus``: a plain PyTorch loop, two processes, nothing else.

``bare_loop.py RUN STEPS WORLD PORT`` trains the network of a run directory's job on premade batches: as many steps as
each line of standard input says, answered by their tokens and seconds.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.bench.batches import Premade, premade


def train(data: Premade, world: int, turns: Iterator[int]) -> Iterator[tuple[float, float]]:
    """Tokens and seconds of each turn of so many steps."""
    model = DistributedDataParallel(data.network.train(), broadcast_buffers=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=data.lr)
    batches = iter(data.steps)
    for steps in turns:
        begin, tokens = time.perf_counter(), 0.0
        for _ in range(steps):
            micro, count = next(batches)
            for index, (batch, weight) in enumerate(micro):
                model.require_backward_grad_sync = index == len(micro) - 1
                loss = data.family.sums(model, batch)["ce"] * (weight * world / count)
                loss.backward()
                loss.item()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += count
        yield tokens, time.perf_counter() - begin


def main(run: str, steps: int, world: int, port: int, rank: int = 0) -> None:
    """One rank; the first starts the others and asks for the turns."""
    with ExitStack() as stack:
        for other in range(1, world) if rank == 0 else ():
            command = [sys.executable, "-m", "tests.bench.bare_loop", *sys.argv[1:5], str(other)]
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        data = premade(Path(run), steps, rank, world)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        for tokens, seconds in train(data, world, _turns(rank)):
            if rank == 0:
                print(tokens, seconds, flush=True)


def _turns(rank: int) -> Iterator[int]:
    """What the first rank reads, on all ranks; its end of input is everybody's."""
    while True:
        steps = torch.tensor([int(sys.stdin.readline() or 0) if rank == 0 else 0])
        dist.broadcast(steps, 0)
        if not steps:
            return
        yield int(steps)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

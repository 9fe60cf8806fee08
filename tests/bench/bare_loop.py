"""The rival of ``apparatus``: a plain PyTorch loop, two processes, nothing else.

``bare_loop.py FOLDER RANK WORLD PORT`` trains the network of ``FOLDER/job.json`` on premade batches and prints JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.bench.batches import Premade, premade


def train(data: Premade, warmup: int) -> dict[str, float]:
    """Steps a second after ``warmup`` steps, and the last loss."""
    model = DistributedDataParallel(data.network.train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=data.lr)
    loss = 0.0
    for step, (micro, count) in enumerate(data.steps):
        if step == warmup:
            dist.barrier()
            begin = time.perf_counter()
        loss = 0.0
        for index, (batch, weight) in enumerate(micro):
            model.require_backward_grad_sync = index == len(micro) - 1
            mean = data.family.sums(model, batch)["ce"] * (weight * dist.get_world_size() / count)
            mean.backward()
            loss += mean.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    return {"steps_per_second": (len(data.steps) - warmup) / seconds, "loss": loss}


if __name__ == "__main__":
    folder, rank, world, port = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    made = premade(folder, rank, world)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    print(json.dumps(train(made, warmup=int(sys.argv[5]))), flush=True)
    dist.destroy_process_group()

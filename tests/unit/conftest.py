"""Runs that look as if they had been trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.adapt import apply, parameter_groups, save_adapter
from trainer.engine import Engine
from trainer.families import open_family
from trainer.rundir import RunDirectory
from trainer.spec import Job, dump_job
from trainer.spec.families import FAMILIES
from trainer.spec.model import Lora

Learnt = Callable[..., RunDirectory]


@pytest.fixture
def learnt(tmp_path: Path) -> Learnt:
    """A run ``sakura`` of a tiny network, by family and method, with one checkpoint, of step 10."""

    def make(family: str, **method: Any) -> RunDirectory:
        job = Job.model_validate(
            {
                "name": "sakura",
                "store": f"file://{tmp_path}",
                "model": {"family": family, "pretrained": "random:tiny"},
                "method": {"type": "lora", **method},
                "data": {"train": [{"dataset": "file:///歌"}]},
                "train": {"steps": 40, "batch": {"songs": 2}},
            }
        )
        run = RunDirectory(f"file://{tmp_path}/runs/sakura")
        run.store.put("job.json", dump_job(job).encode())
        folder = tmp_path / "重み"
        network = open_family(job.model).network()
        if isinstance(job.method, Lora):
            network = apply(network, job.method, FAMILIES[family])
            disturb(network)
            save_adapter(network, folder)
        else:
            disturb(network)
            groups = parameter_groups(network, job.method, job.train.optimizer)
            place = {"strategy": "ddp", "precision": "fp32", "device": torch.device("cpu")}
            Engine(network, open_family(job.model), job.train, groups, **place).save_sharded(folder)
        files = {path.name: path for path in folder.iterdir()}
        run.store.at("checkpoints/step-00000010").publish(files, step=10, meta={"validation_loss": 1.0})
        return run

    return make


@torch.no_grad()
def disturb(network: nn.Module) -> None:
    """Move everything that is trained."""
    draw = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)

"""The batches and the network that a run trains on, made outside any timed part."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from trainer.adapt import apply
from trainer.data.dataset import Dataset, split
from trainer.data.loader import make_batch
from trainer.data.planner import GlobalBatch, Planner, share
from trainer.engine import Micro
from trainer.families import open_family
from trainer.families.base import Family
from trainer.spec import job_from_json
from trainer.spec.data import HeldOut
from trainer.spec.families import FAMILIES
from trainer.spec.model import Lora


@dataclass(frozen=True)
class Premade:
    """What one rank needs to train; ``steps``: its micro-batches, and the tokens that all ranks predict in them."""

    network: nn.Module
    family: Family
    lr: float
    steps: list[tuple[list[Micro], float]]


def premade(folder: Path, steps: int, rank: int, world: int) -> Premade:
    """What ``rank`` sees in the first ``steps`` of the run whose directory is ``folder``, in the same order."""
    job = job_from_json((folder / "job.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    family = open_family(job.model)
    assert isinstance(job.method, Lora) and isinstance(job.data.validation, HeldOut)
    datasets = [Dataset.open(ref.dataset) for ref in job.data.train]
    training, _ = split(datasets, job.data.validation, job.train.seed)
    planner = Planner(
        [data.pool(ids, ref.weight) for data, ids, ref in zip(datasets, training, job.data.train, strict=True)],
        seed=job.train.seed,
        batch=job.train.batch,
        frame_rate=family.frame_rate,
        micro_frames=round(plan["micro_seconds"] * family.frame_rate),
        segment_frames=round(family.segment_seconds * family.frame_rate),
    )

    def micro(batch: GlobalBatch, of: int) -> list[Micro]:
        return [(make_batch(datasets, part, family.collate, training=True), w) for part, w in share(batch, of, world)]

    batches = list(islice(planner.batches(), steps))
    made = [
        (micro(batch, rank), sum(w * b.counts["ce"] for of in range(world) for b, w in micro(batch, of)))
        for batch in batches
    ]
    network = apply(family.network(), job.method, FAMILIES[job.model.family], seed=job.train.seed)
    return Premade(network, family, job.train.optimizer.lr, made)

"""``make demo-base``: makes ``builtin:pocket`` again.

Learns the codebooks on the demo's twelve songs, trains a small MusicGen on other songs of style A, and measures what
the demo has to reach: the loss on the demo's held-out songs of style B, of this base and of the same network trained in
full on many songs of style B.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from trainer.adapt import parameter_groups
from trainer.codecs.pocket import main as learn_codebooks
from trainer.data.dataset import split
from trainer.data.demo import write_songs
from trainer.data.loader import Loader, validation_batches
from trainer.data.planner import Planner
from trainer.data.prepare import prepare
from trainer.engine import Engine
from trainer.families.musicgen.family import MusicGenFamily
from trainer.families.musicgen.network import MusicGenNetwork
from trainer.families.musicgen.spec import MusicGen
from trainer.families.musicgen.weights import Release, save_network
from trainer.loop import train
from trainer.spec import Job
from trainer.spec.data import HeldOut

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "pocket"
CONFIG = {
    "decoder": {
        "vocab_size": 256,
        "num_codebooks": 4,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "ffn_dim": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_factor": 0.09,
    },
    "text_encoder": {"model_type": "hashed", "d_model": 64},
}
SONGS, DEMO_SONGS = 300, 6
"""Of each style; the first ``DEMO_SONGS`` are the demo's own and are not trained on here."""
FRAMES = {"micro_frames": 3000, "segment_frames": 500}
STEPS = 500


def main() -> int:
    """Make the folder ``trainer/builtin/pocket`` again; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_songs(work / "songs", songs=2 * DEMO_SONGS)
        FOLDER.mkdir(exist_ok=True)
        learn_codebooks([str(work / "songs"), str(FOLDER / "codec.safetensors")])
        release = Release("random:pocket", None, CONFIG)
        save_network(release, _start(release), work / "start", {})
        base = _train(_job(work, "start", "a", SONGS))
        base.save(work / "base", torch.float32)
        base.save(FOLDER, torch.float16)
        of_b = _train(_job(work, "base", "b", SONGS))
        card = {
            "parameters": sum(parameter.numel() for parameter in base.network.parameters()),
            "steps": STEPS,
            "held_out_loss": {
                "style a": base.loss(_job(work, "base", "a", DEMO_SONGS)),
                "style b": base.loss(_job(work, "base", "b", DEMO_SONGS)),
                "style b, trained on b": of_b.loss(_job(work, "base", "b", DEMO_SONGS)),
            },
        }
    (FOLDER / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    log.info("%s", json.dumps(card, indent=1))
    return 0


def _start(release: Release) -> MusicGenNetwork:
    """Random weights.

    Codes that style A never uses keep their embeddings and heads: those are made large enough to be told apart, so that
    an adapter can work with them.
    """
    torch.manual_seed(0)
    network = MusicGenNetwork(release.decoder_config(0.0), release.text_width)
    for name, weight in network.named_parameters():
        if ".embed_tokens." in name:
            nn.init.normal_(weight, std=0.5)
        if ".lm_heads." in name:
            nn.init.normal_(weight, std=0.2)
    return network


class _Trained(NamedTuple):
    release: Release
    network: MusicGenNetwork
    family: MusicGenFamily
    engine: Engine

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        save_network(self.release, self.network, folder, {}, dtype)

    def loss(self, job: Job) -> float:
        """On the songs that ``job`` holds out."""
        data = prepare(job)
        _, held_out = split([data], HeldOut(fraction=0.3, by="song"), job.train.seed)
        return self.engine.evaluate(validation_batches([data], held_out, self.family.collate, **FRAMES))["loss"]


class _Quiet:
    """A ``Room`` in which nothing happens."""

    def record(self, step: int, metrics: dict[str, float]) -> None: ...

    def evaluate(self, step: int) -> float:
        return float("nan")

    def listen(self, step: int) -> None: ...

    def commit(self, step: int, position: tuple[int, int], held_out: float) -> None: ...


def _train(job: Job) -> _Trained:
    """Train in full on the songs of ``job`` that are not the demo's."""
    assert isinstance(job.model, MusicGen)
    family, data = MusicGenFamily(job.model), prepare(job)
    network = family.network()
    engine = Engine(
        network,
        family,
        job.train,
        parameter_groups(network, job.method, job.train.optimizer),
        strategy="ddp",
        precision="fp32",
        device=torch.device("cpu"),
    )
    pool = data.pool([song for song in data.songs.ids if int(song.rpartition("-")[2]) > DEMO_SONGS])
    planner = Planner([pool], seed=0, batch=job.train.batch, frame_rate=family.frame_rate, **FRAMES)
    with Loader([data], planner, family.collate) as loader:
        train(job, engine, loader, _Quiet())
    return _Trained(family.release, network, family, engine)


def _job(work: Path, pretrained: str, style: str, songs: int) -> Job:
    return Job.model_validate(
        {
            "name": "demo-base",
            "store": work.as_uri(),
            "model": {
                "family": "musicgen",
                "pretrained": (work / pretrained).as_uri(),
                "codec": {"name": "pocket"},
                "cfg_dropout": 0.1,
            },
            "method": {"type": "full"},
            "data": {
                "train": [{"dataset": f"{work.as_uri()}/{style}-{songs}"}],
                "prepare": {"source": {"type": "demo", "style": style, "songs": songs}},
            },
            "train": {
                "steps": STEPS,
                "batch": {"seconds": 40},
                "optimizer": {"lr": 4e-3},
                "schedule": {"name": "cosine", "warmup": 20},
                "log_every": 50,
            },
        }
    )


if __name__ == "__main__":
    sys.exit(main())

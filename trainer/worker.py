"""One rank: builds everything from the run directory and runs the loop.

Ray Train calls ``run_rank`` in each of its workers. ``python -m trainer.worker RUN_URL`` does the same without Ray:
alone, or one process per GPU under ``torchrun``.
"""

import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel

from trainer.adapt import apply, parameter_groups, save_adapter
from trainer.checkpoint import Checkpoints, Commit, Share
from trainer.codecs import Codec, open_codec
from trainer.data.dataset import Dataset, split
from trainer.data.loader import Loader, validation_batches
from trainer.data.planner import Planner
from trainer.engine import Engine, TrainingState, load_sharded, load_state, save_state
from trainer.families import open_family
from trainer.families.base import Family
from trainer.loop import train
from trainer.mirror import Mirror
from trainer.rundir import RunDirectory, unexpected
from trainer.spec.data import HeldOut
from trainer.spec.errors import UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.model import Lora
from trainer.tracking import End, Follower, Journal, SystemMetrics
from trainer.validation.render import render, store_audio

log = logging.getLogger("trainer.worker")
STATE = "state.safetensors"
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Ranks wait for each other this long; rendering long validation songs takes some ranks longer than others."""
OOM_COUNTS = Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")
"""Where Linux counts, by version 2 and version 1 of control groups: ``memory.events`` in its ``cgroup-v2.rst``, and
``oom_kill`` in ``mm/memcontrol-v1.c``."""
_CUT_OFF = re.compile(r"gloo|nccl|connection|timed? ?out|peer", re.IGNORECASE)
_GROUP_GONE = "process group has not been initialized"
"""torch's ``ValueError`` in a rank whose group Ray Train has taken down, since another rank was lost."""


def run_rank(run_url: str, notice: Callable[[], bool]) -> bool:
    """Train as this rank of the process group (alone, if there is none) until the run has its result.

    Args:
        run_url: the run directory.
        notice: says whether this rank's machine is being taken away. Once it does, on any rank, all ranks commit the
            step that they are in, and return.

    Returns:
        Whether the run has its result.

    Raises:
        UtaforgeError: the run cannot go on; ``failure.json`` says why.
    """
    run = RunDirectory(run_url)
    with tempfile.TemporaryDirectory(prefix="utaforge-rank-") as scratch, ExitStack() as stack:
        words = stack.enter_context(_logging(run, _place()[0], Path(scratch)))
        stack.enter_context(_telling_failures(run))
        rank = _Rank(run, Path(scratch), words, notice)
        stack.enter_context(rank.tracking())
        rank.train()
        return rank.done


class _Rank:
    """Everything one rank has; the loop's ``Room``."""

    def __init__(self, run: RunDirectory, scratch: Path, words: Mirror, notice: Callable[[], bool]) -> None:
        self.run, self.job, self.scratch, self.words = run, run.job, scratch, words
        self.rank, self.world = _place()
        self.family = open_family(self.job.model)
        self.codec = open_codec(self.job.model)
        self.data = _Songs(run, self.rank)
        self.data.check(self.family, self.codec)
        self.frames = {
            "micro_frames": round(run.plan["micro_seconds"] * self.family.frame_rate),
            "segment_frames": round(self.family.segment_seconds * self.family.frame_rate),
        }
        self.checkpoints = Checkpoints(run.store.at("checkpoints"), self.job.checkpoint.keep)
        self.attempt, newest = self._agree(self.checkpoints.newest() if self.rank == 0 else None)
        self.losses: dict[str, float] = dict(newest.meta["losses"]) if newest else {}
        self.position = (newest.meta["position"][0], newest.meta["position"][1]) if newest else (0, 0)
        self.engine = self._engine(self._restore(newest) if newest else None, notice)
        self.journal: Journal | None = None
        if newest:
            log.info("going on from step %d", newest.step)
        if self.job.cluster.backend == "kubernetes" and (killed := killed_for_memory()):
            log.warning("this pod ran out of memory: the kernel has killed %d of its processes so far", killed)

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.engine.steps == self.job.train.steps

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Metrics go to the journal, and from there to MLflow; rank 0 alone does this."""
        if self.rank:
            yield
            return
        self.system = SystemMetrics()
        self.journal = Journal(self.run.store, self.scratch / "metrics.jsonl", self.engine.steps)
        lost = self.job.cluster.backend == "kubernetes" and not self.job.tracking.mlflow  # MLflow's file, with its pod
        follower = None if lost else Follower(self.run.url, self.journal.path)
        end: End = "FAILED"
        try:
            yield
            end = "FINISHED" if self.done else "KILLED"
        finally:
            self.journal.close(self.engine.steps, end)
            if follower:
                follower.close()

    def train(self) -> None:
        """Run the loop, then leave the result if all steps are made."""
        planner = Planner(
            self.data.training,
            seed=self.job.train.seed,
            batch=self.job.train.batch,
            frame_rate=self.family.frame_rate,
            **self.frames,
        )
        place = {"rank": self.rank, "world": self.world}
        with Loader(self.data.datasets, planner, self.family.collate, **place, start=self.position) as loader:
            train(self.job, self.engine, loader, self)
        self.checkpoints.wait()
        if self.done:
            self._finish()
        else:
            log.info("given notice: stopped at step %d with a checkpoint", self.engine.steps)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics to the journal, with the machine's own."""
        if self.journal:
            self.journal.record(step, {**metrics, **self.system.sample()})

    def evaluate(self, step: int) -> float:
        """Held-out loss with the current weights, recorded."""
        batches = validation_batches(
            self.data.datasets,
            self.data.held_out,
            self.family.collate,
            **self.frames,
            rank=self.rank,
            world=self.world,
        )
        means = self.engine.evaluate(batches)
        self.losses[str(step)] = means["loss"]
        self.record(step, {f"validation/{term}": value for term, value in means.items()})
        log.info("step %d/%d · held-out loss %.4f", step, self.job.train.steps, means["loss"])
        return means["loss"]

    def listen(self, step: int) -> None:
        """Render the validation prompts with the current weights; the songs go into the run directory and to MLflow."""
        validation = self.job.validation
        if not validation.prompts:
            return
        with self.engine.generating() as network:
            lockstep = self.engine.lockstep
            songs = render(
                network, self.family, self.codec, validation, rank=self.rank, world=self.world, lockstep=lockstep
            )
        stored = store_audio(self.run.store, step, songs)
        self.record(step, stored.metrics)
        for path in stored.paths:
            if self.journal:
                self.journal.artifact(step, path)
        log.info("step %d/%d · %d songs rendered", step, self.job.train.steps, len(validation.prompts))

    def commit(self, step: int, position: tuple[int, int], held_out: float) -> None:
        """Put a checkpoint of this moment into the store, beside training."""
        self.checkpoints.wait()
        folder, share = self.scratch / "checkpoint", None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if isinstance(self.network, PeftModel):
            state = self.engine.state()
            if self.journal is None:
                return
            self._write_adapter(folder, state)
            save_state(state, folder / STATE)
        else:
            self.engine.save_sharded(folder)
            share = Share(self.rank, self.world, self.attempt)
        meta = {"position": position, "world": self.world, "validation_loss": held_out, "losses": self.losses}
        files = {path.name: path for path in sorted(folder.iterdir())}
        self.checkpoints.save(step, files, meta, self._tell, share)

    def _tell(self) -> None:
        """Log and journal reach the store before the checkpoint that follows them: those steps are not made again."""
        self.words.now()
        if self.journal:
            self.journal.mirror.now()

    def _finish(self) -> None:
        """Leave the trained weights and the result."""
        if self.journal is None:
            return
        newest = self.checkpoints.newest()
        assert newest is not None, "the last step is always committed"
        folder = self.scratch / "final"
        if isinstance(self.network, PeftModel):
            kind = "adapter"
            self._write_adapter(folder, self._restore(newest))
        else:
            kind = "model"
            tensors = self._restore(newest).tensors
            self.family.save(self.network, folder, {name: tensors[name]["param"] for name in tensors})
        self.run.store.at(kind).publish({path.name: path for path in folder.iterdir()}, step=newest.step)
        losses = {int(step): loss for step, loss in self.losses.items()}
        best = self.checkpoints.best()
        self.run.finish(
            {
                "steps": newest.step,
                "loss": self.journal.last("train/loss"),
                "loss_before": losses[min(losses)],
                "loss_after": losses[max(losses)],
                "best_step": best.step if best else None,
                kind: kind,
            }
        )

    def _write_adapter(self, folder: Path, state: TrainingState) -> None:
        assert isinstance(self.network, PeftModel)
        save_adapter(self.network, folder, {name: values["param"] for name, values in state.tensors.items()})

    def _engine(self, state: TrainingState | None, notice: Callable[[], bool]) -> Engine:
        method, plan = self.job.method, self.run.plan
        self.network = self.family.network()
        if isinstance(method, Lora):
            self.network = apply(self.network, method, FAMILIES[self.job.model.family], seed=self.job.train.seed)
        return Engine(
            self.network,
            self.family,
            self.job.train,
            parameter_groups(self.network, method, self.job.train.optimizer),
            strategy=plan["strategy"],
            precision=plan["precision"],
            device=_device(plan["device"]),
            resume=state,
            notice=notice,
        )

    def _agree(self, newest: Commit | None) -> tuple[int, Commit | None]:
        """A number of this attempt, and the newest commit: rank 0's, on every rank."""
        told = torch.tensor([secrets.randbits(62), newest.step if newest else -1])
        if self.world > 1:
            told = told.to(_device(self.run.plan["device"]))
            dist.broadcast(told, 0)
        attempt, step = told.tolist()
        if newest is None and step >= 0:
            newest = next((commit for commit in self.checkpoints.commits() if commit.step == step), None)
        return attempt, newest

    def _restore(self, commit: Commit) -> TrainingState:
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        self.checkpoints.restore(commit, folder)
        return load_state(folder / STATE) if isinstance(self.job.method, Lora) else load_sharded(folder)


class _Songs:
    """The datasets of a run, in the versions that its first attempt pinned, and who trains on what."""

    def __init__(self, run: RunDirectory, rank: int) -> None:
        spec = run.job.data
        if rank == 0:
            run.pin_data(lambda url: Dataset.open(url).pin)
        if dist.is_initialized():
            dist.barrier()
        pins = run.pinned_data
        train = [Dataset.open(pin["url"], pin["version"]) for pin in pins["train"]]
        self.datasets = train
        if isinstance(spec.validation, HeldOut):
            ids, self.held_out = split(train, spec.validation, run.job.train.seed)
        else:
            held_out = Dataset.open(pins["validation"]["url"], pins["validation"]["version"])
            self.datasets = [*train, held_out]
            ids = [data.songs.ids for data in train]
            self.held_out = [*([] for _ in train), held_out.songs.ids]
        self.training = [
            data.pool(chosen, ref.weight) for data, chosen, ref in zip(train, ids, spec.train, strict=True)
        ]

    def check(self, family: Family, codec: Codec) -> None:
        """Raise ``DataError`` if the network cannot be trained on these codes."""
        for data in self.datasets:
            data.check_against(
                codebooks=family.codebooks,
                vocabulary=family.vocabulary,
                frame_rate=family.frame_rate,
                latent_shape=family.latent_shape,
                fingerprint=codec.fingerprint,
            )


@contextmanager
def _telling_failures(run: RunDirectory) -> Iterator[None]:
    """A reason not to go on is written to the run directory; what merely cut this rank off is not."""
    try:
        yield
    except UtaforgeError as error:
        run.report_failure(error)
        raise
    except (RuntimeError, ValueError) as error:
        if _CUT_OFF.search(str(error)) if isinstance(error, RuntimeError) else _GROUP_GONE in str(error):
            raise
        run.report_failure(unexpected(error))
        raise
    except Exception as error:
        run.report_failure(unexpected(error))
        raise


@contextmanager
def _logging(run: RunDirectory, rank: int, scratch: Path) -> Iterator[Mirror]:
    """This rank's words are added to ``logs/rank-N.log`` of the run directory, rank 0's to standard output too."""
    name, path = f"logs/rank-{rank}.log", scratch / f"rank-{rank}.log"
    path.write_bytes(run.store.get_or_none(name) or b"")
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler(sys.stdout)
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    own = logging.getLogger("trainer")
    before = own.level, own.propagate
    own.setLevel(logging.INFO)
    own.propagate = False
    mirror = Mirror(run.store, name, path)
    for handler in (file, screen):
        own.addHandler(handler)
    try:
        yield mirror
    finally:
        for handler in (file, screen):
            own.removeHandler(handler)
        file.close()
        own.level, own.propagate = before
        mirror.close()


def killed_for_memory(counts: Iterable[Path] = OOM_COUNTS) -> int:
    """How many processes of this container the kernel has killed for want of memory; 0 where it does not say.

    Of these Ray only guesses ("some common causes include"); it is sure of what its own memory monitor has killed.
    """
    for path in counts:
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _place() -> tuple[int, int]:
    """(rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Whether this process was asked to end."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    """``RUN_URL``; under ``torchrun`` one of several ranks. SIGTERM is a notice. Returns the exit status."""
    (run_url,) = argv if argv is not None else sys.argv[1:]
    if "RANK" in os.environ or RunDirectory(run_url).plan["strategy"] != "ddp":
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
            os.environ.setdefault(name, value)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        with _sigterm() as notice:
            return 0 if run_rank(run_url, notice) else 128 + signal.SIGTERM
    except UtaforgeError as error:
        log.error("%s", error)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

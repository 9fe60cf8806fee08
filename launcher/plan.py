"""Job × profile → everything that will happen, computed before it happens."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.memory import Load, Memory, Precision, Strategy, memory, most_positions
from launcher.profiles import GIB, Profile, cores_here, find_profile, ram_here
from trainer.spec import Job, JobError
from trainer.spec.families import FAMILIES, dims_of
from trainer.spec.family import adapted, lora_parameters
from trainer.spec.job import BatchSeconds
from trainer.spec.model import Lora

USABLE = 0.92
"""Share of a device's memory that a plan may fill."""
CPU_MICRO_SECONDS = 60.0
"""On CPUs larger micro-batches gain nothing."""


@dataclass(frozen=True)
class Plan:
    """What a job will do.

    Attributes:
        job: its name.
        family: for people.
        method: for people.
        profile: name of the hardware shape.
        machine: that shape, as it was when this was planned.
        machines: how many of it.
        backend: where the cluster comes from.
        device: of each rank.
        ranks: processes that train, one device each.
        strategy: how states are spread over them.
        precision: of the computation.
        batch_seconds: audio in one optimizer step, over all ranks, at most.
        micro_seconds: audio in one forward pass on one rank, padding included.
        micro_batches: forward passes of one rank in one step, about.
        steps: optimizer steps.
        trained: parameters trained.
        frozen: parameters not trained.
        memory: bytes of one rank, by part.
        device_bytes: that one rank can have.
        hours: the least it can take; None where nothing can be said.
        hours_basis: what that rests on.
        usd: what ``hours`` cost; None where nobody sends a bill, or no price is known, or hours are unknown.
        usd_basis: what that rests on, and whether it is the least or, of spot nodes without a price, the most.
        checks: what looks odd and is allowed.
        sampling: what songs are rendered with, by field of ``validation.sampling``.
    """

    job: str
    family: str
    method: str
    profile: str
    machine: Profile
    machines: int
    backend: str
    device: Literal["cpu", "cuda"]
    ranks: int
    strategy: Strategy
    precision: Precision
    batch_seconds: float
    micro_seconds: float
    micro_batches: int
    steps: int
    trained: int
    frozen: int
    memory: Memory
    device_bytes: int
    hours: float | None
    hours_basis: str
    usd: float | None
    usd_basis: str
    checks: tuple[str, ...]
    sampling: dict[str, float | str]

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and for ``plan.json``, which the trainer reads."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "machine": self.machine.model_dump(mode="json"), "memory": memory}


def plan(job: Job, beside: Path | None = None) -> Plan:
    """The plan of ``job``.

    Args:
        job: the job.
        beside: folder of its file, where profiles of one's own may be.

    Raises:
        JobError: there is no such profile, or the job does not fit it, with what would make it fit.
    """
    profile = find_profile(job.cluster.profile, beside)
    ranks = job.cluster.workers or profile.gpus or 1
    machines = _machines(job, profile, ranks)
    device_bytes = profile.gpu_bytes or _ram_of_rank(job, profile, ranks)
    strategy, load = _strategy(job, profile, ranks, device_bytes)
    batch_seconds, micro_seconds = _batch(job), load.positions / _frame_rate(job)
    hours, hours_basis = _hours(job, profile, load, batch_seconds)
    if hours and job.budget.hours and hours > job.budget.hours:
        raise JobError(
            f"budget.hours: {job.budget.hours:g} are fewer than the {hours:.1f} that this takes at least",
            "raise it, lower train.steps, or take a profile with more GPUs",
        )
    usd, usd_basis = _usd(job, profile, machines, hours)
    return Plan(
        job=job.name,
        family=FAMILIES[job.model.family].title,
        method=_method(job),
        profile=profile.name,
        machine=profile,
        machines=machines,
        backend=job.cluster.backend,
        device="cuda" if profile.gpu else "cpu",
        ranks=ranks,
        strategy=strategy,
        precision=load.precision,
        batch_seconds=batch_seconds,
        micro_seconds=micro_seconds,
        micro_batches=max(1, round(batch_seconds / ranks / micro_seconds)),
        steps=job.train.steps,
        trained=load.trained,
        frozen=load.frozen,
        memory=memory(load),
        device_bytes=device_bytes,
        hours=hours,
        hours_basis=hours_basis,
        usd=usd,
        usd_basis=usd_basis,
        checks=tuple(_checks(job, profile, load, machines, batch_seconds)),
        sampling=job.validation.sampling.given,
    )


def _machines(job: Job, profile: Profile, ranks: int) -> int:
    if job.cluster.backend == "local":
        return 1
    machines = -(-ranks // max(profile.gpus, 1))
    if ranks % machines:
        raise JobError(
            f"cluster.workers: {ranks} ranks do not spread evenly over {machines} machines of {profile.gpus} GPUs",
            f"write a multiple of {machines}, or at most {profile.gpus}",
        )
    return machines


def _ram_of_rank(job: Job, profile: Profile, ranks: int) -> int:
    return ram_here() // ranks if job.cluster.backend == "local" else int(profile.ram_gib * GIB)


def _strategy(job: Job, profile: Profile, ranks: int, device_bytes: int) -> tuple[Strategy, Load]:
    """The first strategy that fits, of those the job allows, with the micro-batch that it then has."""
    wanted = job.train.strategy
    every: tuple[Strategy, ...] = ("ddp", "zero2", "zero3") if ranks > 1 else ("ddp",)
    allowed = every if wanted == "auto" else (wanted,)
    for strategy in allowed:
        load = _load(job, profile, ranks, strategy)
        fitting = most_positions(load, int(device_bytes * USABLE))
        if (positions := _positions(job, profile, ranks, fitting)) is not None:
            return strategy, replace(load, positions=positions)
    raise _too_large(job, profile, ranks, allowed[-1], device_bytes)


def _load(job: Job, profile: Profile, ranks: int, strategy: Strategy) -> Load:
    family, dims = FAMILIES[job.model.family], dims_of(job.model)
    trained, frozen, layers = dims.parameters, 0, 0
    if isinstance(job.method, Lora):
        targets, also = family.targets(job.method), _trained_in_full(job.method)
        trained = lora_parameters(family, dims, job.method.rank, targets, dora=job.method.dora, train_also=also)
        trained += round(sum(family.train_also[name] for name in also) * dims.parameters / family.dims.parameters)
        frozen = dims.parameters
        layers = sum(len(shapes) for shapes in adapted(family, dims, targets, also).values())
    precision = _precision(job, profile)
    checkpointing, gpu = job.train.gradient_checkpointing, profile.gpu is not None
    return Load(dims, trained, frozen, layers, precision, strategy, ranks, 0, checkpointing, gpu)


def _positions(job: Job, profile: Profile, ranks: int, fitting: int) -> int | None:
    """Positions of a micro-batch: as the job says, else what fits and a rank's share has; None if too few fit."""
    rate = _frame_rate(job)
    segment = job.model.segment_seconds
    if given := job.train.batch.micro_seconds:
        return round(given * rate) if given * rate <= fitting else None
    share = max(segment, _batch(job) / ranks)
    wanted = share if profile.gpu else min(share, max(segment, CPU_MICRO_SECONDS))
    return min(fitting, round(wanted * rate)) if fitting >= segment * rate else None


def _too_large(job: Job, profile: Profile, ranks: int, strategy: Strategy, device_bytes: int) -> JobError:
    seconds = job.train.batch.micro_seconds or job.model.segment_seconds
    load = replace(_load(job, profile, ranks, strategy), positions=round(seconds * _frame_rate(job)))
    needed = memory(load)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(needed).items())
    where = f"a {profile.gpu}" if profile.gpu else "each worker of this machine"
    cures = [
        "lower train.batch.micro_seconds" if job.train.batch.micro_seconds else "lower model.segment_seconds",
        *(["set train.gradient_checkpointing: true"] if not job.train.gradient_checkpointing else []),
        *(["set train.strategy: auto"] if job.train.strategy != "auto" else []),
        *(["use method: {type: lora}"] if not isinstance(job.method, Lora) else []),
        "use fewer cluster.workers" if profile.gpu is None else "use another cluster.profile",
    ]
    return JobError(
        f"{job.name} does not fit: {seconds:g} s of audio under {strategy} need {needed.total / GIB:.1f} GiB "
        f"on each rank ({parts}); {where} has {device_bytes * USABLE / GIB:.1f} GiB to give",
        "; or ".join(cures),
    )


def _precision(job: Job, profile: Profile) -> Precision:
    wanted = job.train.precision
    if wanted == "fp16" and profile.gpu is None:
        raise JobError(
            f"train.precision: fp16 needs a GPU, and profile {profile.name} has none", "write auto, fp32 or bf16"
        )
    if wanted == "bf16" and profile.gpu and not profile.bf16:
        raise JobError(f"train.precision: a {profile.gpu} has no bf16", "write auto or fp16")
    if wanted != "auto":
        return wanted
    if profile.gpu is None:
        return "fp32"
    return "bf16" if profile.bf16 else "fp16"


def _batch(job: Job) -> float:
    batch = job.train.batch
    return batch.seconds if isinstance(batch, BatchSeconds) else batch.songs * job.model.segment_seconds


def _frame_rate(job: Job) -> float:
    return FAMILIES[job.model.family].frame_rate


def _method(job: Job) -> str:
    if not isinstance(job.method, Lora):
        return "full fine-tuning"
    left_out, also = _left_out(job), _trained_in_full(job.method)
    targets = ", ".join(name for name in FAMILIES[job.model.family].targets(job.method) if name not in left_out)
    beside = f"; {', '.join(also)} in full" if also else ""
    return f"LoRA rank {job.method.rank}, alpha {job.method.alpha:g} on {targets}{beside}"


def _trained_in_full(method: Lora) -> list[str]:
    return [each.modules for each in method.train_also]


def _left_out(job: Job) -> list[str]:
    """Targets of which nothing is adapted, because all of it lies in modules that are trained in full."""
    if not isinstance(job.method, Lora):
        return []
    family, dims, also = FAMILIES[job.model.family], dims_of(job.model), _trained_in_full(job.method)
    targets = family.targets(job.method)
    return [name for name in targets if adapted(family, dims, [name]) and not adapted(family, dims, [name], also)]


def _hours(job: Job, profile: Profile, load: Load, batch_seconds: float) -> tuple[float | None, str]:
    """The least that the arithmetic takes: per position 2 operations a parameter forward, 2 back, 2 if it is trained.

    Source of the count: Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1.
    """
    if profile.peak_flops is None:
        return None, "not estimated: CPUs differ too much; the progress line tells once it runs"
    positions = batch_seconds * _frame_rate(job) * job.train.steps
    operations = positions * (4 * (load.trained + load.frozen) + 2 * load.trained)
    hours = operations / (profile.peak_flops * load.ranks) / 3600
    return (
        hours,
        f"at least: {profile.gpu}s at their full {profile.peak_flops / 1e12:.0f} TFLOP/s; real runs take longer",
    )


def _usd(job: Job, profile: Profile, machines: int, hours: float | None) -> tuple[float | None, str]:
    if job.cluster.backend == "local":
        return None, "this machine"
    if not profile.prices or hours is None:
        return None, "no price known" if hours is not None else "the time is not known"
    price, spot = profile.prices[0], getattr(job.cluster, "spot", False)
    usd = (price.spot_usd_per_hour if spot else None) or price.usd_per_hour
    kind = "spot" if spot and price.spot_usd_per_hour else "on demand"
    bound = "at most for these hours, since spot is cheaper" if spot and kind != "spot" else "at least"
    basis = f"{bound}: {machines} × {price.machine}, {usd:g} USD an hour {kind}, {price.source}, {price.as_of}"
    return hours * machines * usd, basis


def _checks(job: Job, profile: Profile, load: Load, machines: int, batch_seconds: float) -> Iterator[str]:
    train, ranks = job.train, load.ranks
    if left_out := _left_out(job):
        yield f"method.train_also: trains {', '.join(left_out)} in full with all around them; no adapter is put on them"
    if train.schedule.warmup > train.steps / 2:
        yield f"train.schedule.warmup: {train.schedule.warmup} of {train.steps} steps are warm-up"
    if batch_seconds < ranks * job.model.segment_seconds:
        yield (
            f"train.batch: {batch_seconds:g} s for {ranks} ranks is less than a "
            f"{job.model.segment_seconds:g} s segment each; some ranks may idle in a step"
        )
    if job.checkpoint.every > train.steps:
        yield f"checkpoint.every: {job.checkpoint.every} is more than {train.steps} steps; only the end is saved"
    if not job.validation.prompts:
        yield "validation.prompts: none, so no audio is rendered"
    if job.cluster.backend == "local" and profile.gpu is None and ranks > cores_here():
        yield f"cluster.workers: {ranks} workers share {cores_here()} cores"
    if job.cluster.backend == "kubernetes" and not job.tracking.mlflow:
        yield "tracking.mlflow: none, so metrics go to the run directory only; utaforge sync brings them to MLflow here"
    if machines > 1 and profile.interconnect_gbps:
        seconds = 2 * 4 * 8 * load.trained / (profile.interconnect_gbps * 1e9)
        yield f"network: the gradients of a step take at least {seconds:.2g} s between {machines} machines"

"""One optimizer step, whatever the strategy and the precision.

The loss of a step is, for each term, the sum over all micro-batches of all ranks over their count, so that padding,
accumulation and world size never change it. What is trained is kept in fp32; in ``bf16`` and ``fp16`` the frozen
matrices are kept in that precision, and everything computes under autocast.

``python -m trainer.engine --warm`` compiles DeepSpeed's operator for ranks on CPUs, once.
"""

import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from trainer.families.base import Batch, Family
from trainer.spec.errors import TrainingError
from trainer.spec.job import Train

log = logging.getLogger(__name__)

Strategy = Literal["ddp", "zero2", "zero3"]
Precision = Literal["fp32", "bf16", "fp16"]
Micro = tuple[Batch, float]
"""A micro-batch and its weight: 1, or 0 where a rank repeats one only to keep step with the others."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
WHOLE_BELOW = 100_000
"""ZeRO-3 does not cut parameters of fewer elements (norms, LoRA): gathering them would cost more than it saves."""
NUMBERS = "numbers.json"
"""What a sharded state holds beside its tensors."""
SKIPS_IN_A_ROW = 20
"""Overflows of fp16 after which it is given up: the scale is then down to a millionth of its start."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found, over all ranks.

    Attributes:
        loss: Σ weight · mean over the terms.
        terms: mean of each term.
        grad_norm: before clipping; infinite if skipped.
        skipped: fp16 overflowed, nothing moved.
        tokens: predicted in the step.
        frames: of audio in the step.
        noticed: some rank's machine is being taken away.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    skipped: bool
    tokens: float
    frames: float
    noticed: bool


@dataclass
class LossScale:
    """Dynamic scale of the fp16 loss (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740); 1 elsewhere."""

    value: float = 1.0
    good: int = 0
    """Steps since the last overflow or growth."""
    skips: int = 0
    """Overflows in a row."""

    GROW_AFTER = 2000

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after ``GROW_AFTER`` steps without."""
        if not finite:
            self.value, self.good, self.skips = self.value / 2, 0, self.skips + 1
            return
        self.good, self.skips = self.good + 1, 0
        if self.good == self.GROW_AFTER:
            self.value, self.good = self.value * 2, 0


@dataclass(frozen=True)
class TrainingState:
    """Everything an engine has learned, free of strategy and world size.

    Attributes:
        step: optimizer steps done.
        updates: those of them that moved the weights, that is, were not skipped.
        scale: of the fp16 loss.
        tensors: parameter's name → ``param``, ``exp_avg``, ``exp_avg_sq``, fp32 on the CPU; empty but on rank 0.
    """

    step: int = 0
    updates: int = 0
    scale: LossScale = field(default_factory=LossScale)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])


class Engine:
    """Trains one network on this rank, together with all others.

    Every method but ``generating`` is a collective: all ranks call it, with equally many micro-batches.

    Args:
        network: on the CPU in fp32; what does not require gradients is frozen.
        family: its objective.
        train: the job's section.
        groups: of trainable parameters, from ``trainer.adapt.parameter_groups``.
        strategy: how ranks share the work. ZeRO needs an initialised process group, also alone.
        precision: of the computation.
        device: of this rank.
        resume: a state to continue from, read by every rank.
        notice: says whether this rank's machine is being taken away; asked once a step.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        train: Train,
        groups: list[dict[str, Any]],
        *,
        strategy: Strategy,
        precision: Precision,
        device: torch.device,
        resume: TrainingState | None = None,
        notice: Callable[[], bool] = lambda: False,
    ) -> None:
        self.network = network
        self._notice = notice
        self.family = family
        self.device = device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.steps, self.updates = (resume.step, resume.updates) if resume else (0, 0)
        self.scale = LossScale(2.0**16) if precision == "fp16" else LossScale()
        if train.gradient_checkpointing:
            network.gradient_checkpointing_enable()  # type: ignore[operator]  (every family's network has it)
        self._trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if resume:
            self.scale = replace(resume.scale)
            _load_parameters(self._trainable, resume)
        for parameter in network.parameters():
            if not parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.to(DTYPES[precision])
        self._module = _Autocast(network, device, DTYPES[precision]).to(device).train()
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=train.optimizer.betas, eps=train.optimizer.eps)
        self._optimizer = optimizer
        self._sharing: _Sharing = (
            _Replicated(self._module, optimizer, train.clip)
            if strategy == "ddp"
            else _Sharded(self._module, optimizer, train.clip, 2 if strategy == "zero2" else 3)
        )
        self.lockstep = strategy == "zero3" and self.world > 1
        if resume and resume.updates:
            self._sharing.write_moments(self._trainable, resume)

    def step(self, micro: Sequence[Micro], lr: float, seed: tuple[int, ...] = ()) -> StepResult:
        """Move the weights once.

        Args:
            micro: this rank's micro-batches of the step.
            lr: learning rate of the step.
            seed: of all draws inside the network; the rank is added.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing has moved. (In fp16 an overflow of the
                gradient only skips the step, unless too many follow each other.)
        """
        torch.manual_seed(int(np.random.SeedSequence((*seed, self.rank)).generate_state(1, np.uint64)[0]))
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        counts, frames = self._global_counts(micro)
        sums = torch.zeros(len(counts), device=self.device)
        for index, (batch, weight) in enumerate(micro):
            batch = batch.to(self.device)
            with self._sharing.micro_batch(last=index == len(micro) - 1):
                found = self.family.sums(self._sharing.module, batch)
                # Ranks' gradients are averaged, hence the world.
                self._sharing.backward(self._total(found, counts) * (weight * self.world), self.scale.value)
            sums += weight * torch.stack([found[term].detach().float() for term in counts])
        told = nn.functional.pad(sums, (0, 1), value=float(self._notice()))  # all ranks learn of it in the same step
        terms = self._means(told, {**counts, "notices": 1.0})
        noticed = terms.pop("notices") > 0
        loss = self._total(terms, dict.fromkeys(counts, 1.0))
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss)
        norm = self._sharing.step(self.scale.value)
        self._after(norm)
        return StepResult(loss, terms, norm, not math.isfinite(norm), max(counts.values()), frames, noticed)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Micro]) -> dict[str, float]:
        """Mean of each term over all batches of all ranks, and their total as ``loss``."""
        sums = {term: torch.zeros((), device=self.device) for term in self.family.terms}
        seen: list[Micro] = []
        self._module.eval()
        for batch, weight in batches:
            for term, value in self.family.sums(self._module, batch.to(self.device)).items():
                sums[term] += weight * value
            seen.append((Batch({}, batch.counts, batch.frames), weight))
        self._module.train()
        counts, _ = self._global_counts(seen)
        terms = self._means(torch.stack(list(sums.values())), counts)
        return {"loss": self._total(terms, dict.fromkeys(counts, 1.0)), **terms}

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """The network, ready for ``family.generate``. If ``lockstep``, all ranks must generate the same prompts."""
        self._module.eval()
        with torch.no_grad():
            yield self._module
        self._module.train()

    def state(self) -> TrainingState:
        """What to continue from; whole on rank 0, without tensors elsewhere."""
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for name, parameter in self._trainable.items():
            values = self._sharing.read(parameter, started=self.updates > 0)
            if self.rank == 0:
                tensors[name] = {key: value.detach().to("cpu", torch.float32) for key, value in values.items()}
        return TrainingState(self.steps, self.updates, replace(self.scale), tensors)

    def save_sharded(self, folder: Path) -> None:
        """Write the state into ``folder``, every rank its share, for ``load_sharded`` at any world size.

        No rank ever holds more than its share and one parameter. The files are safetensors, written by
        ``torch.distributed.checkpoint``, and a little JSON.
        """
        shares: dict[str, Any] = {}
        mesh = init_device_mesh("cpu", (self.world,)) if dist.is_initialized() else None
        for name, parameter in self._trainable.items():
            for key, value in self._sharing.read(parameter, started=self.updates > 0).items():
                shares[f"{key}/{name}"] = _share(value, mesh, self.rank) if mesh else value.detach().cpu()
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _alone_on_purpose():
            save_checkpoint(shares, storage_writer=writer, no_dist=mesh is None)
        if self.rank == 0:
            (folder / NUMBERS).write_text(
                _numbers(TrainingState(self.steps, self.updates, self.scale)), encoding="utf-8"
            )

    def _global_counts(self, micro: Iterable[Micro]) -> tuple[dict[str, float], float]:
        mine = [
            [weight * batch.counts[t] for t in self.family.terms] + [weight * batch.frames] for batch, weight in micro
        ]
        width = len(self.family.terms) + 1
        total = torch.tensor(mine, dtype=torch.float64).reshape(-1, width).sum(0).to(self.device)
        self._all_reduce(total)
        *counts, frames = total.tolist()
        return {term: max(count, 1.0) for term, count in zip(self.family.terms, counts, strict=True)}, frames

    def _means(self, sums: Tensor, counts: Mapping[str, float]) -> dict[str, float]:
        self._all_reduce(sums)
        return {term: total / count for (term, count), total in zip(counts.items(), sums.tolist(), strict=True)}

    def _total(self, sums: Mapping[str, Any], counts: Mapping[str, float]) -> Any:
        return sum(weight * sums[term] / counts[term] for term, weight in self.family.terms.items() if weight)

    def _all_reduce(self, tensor: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor)

    def _after(self, norm: float) -> None:
        finite = math.isfinite(norm)
        if not finite and self._module.dtype != torch.float16:
            raise self._not_finite("gradient norm", norm)
        if self._module.dtype == torch.float16:
            self.scale.update(finite)
            if self.scale.skips == SKIPS_IN_A_ROW:
                raise self._not_finite(f"gradient norm {SKIPS_IN_A_ROW} times in a row, the last", norm)
        self.steps, self.updates = self.steps + 1, self.updates + finite

    def _not_finite(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"step {self.steps + 1}: the {what} is {value}; the weights are those of step {self.steps}",
            "lower train.optimizer.lr, lengthen train.schedule.warmup, or choose train.precision: fp32 or bf16",
        )


def save_state(state: TrainingState, file: Path) -> None:
    """Write ``state`` as safetensors: ``param/<name>``, ``exp_avg/<name>``, …, the numbers as metadata."""
    tensors = {f"{key}/{name}": value for name, values in state.tensors.items() for key, value in values.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"state": _numbers(state)})


def load_state(file: Path) -> TrainingState:
    """What ``save_state`` wrote."""
    tensors: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as content:
        numbers = content.metadata()["state"]
        for key in content.keys():  # noqa: SIM118  (not a mapping)
            kind, name = key.split("/", 1)
            tensors.setdefault(name, {})[kind] = content.get_tensor(key)
    return _state(numbers, tensors)


def load_sharded(folder: Path) -> TrainingState:
    """What ``Engine.save_sharded`` wrote; each tensor is read when it is asked for, and not kept."""
    return _state((folder / NUMBERS).read_text(encoding="utf-8"), _TensorsOnDisk(folder))


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1): linear warm-up, then constant or half a cosine."""
    peak, shape = train.optimizer.lr, train.schedule
    if step <= shape.warmup:
        return peak * step / shape.warmup
    if shape.name == "constant":
        return peak
    done = (step - 1 - shape.warmup) / max(train.steps - shape.warmup, 1)
    return peak * (shape.final + (1 - shape.final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def remove_stale_locks() -> None:
    """Remove what a killed compilation left behind, for which the next one would wait for ever.

    Torch holds the lock file open while it compiles; a lock that no process holds open is stale.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = {lock.resolve() for lock in root.rglob("lock")} if root.is_dir() else set()
    if not locks:
        return
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            locks.discard(handle.readlink())
        except OSError:  # the process is gone, or not ours
            continue
    for lock in locks:
        log.warning("removing the lock of a compilation that did not end: %s", lock)
        lock.unlink(missing_ok=True)


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without PyTorch's warning that a checkpoint is written or read by a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _TensorsOnDisk(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of a sharded state, put together from their shards one parameter at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        found = HuggingFaceStorageReader(self._folder).read_metadata().state_dict_metadata
        self._sizes = {key: entry.size for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        values = {key: torch.empty(self._sizes[f"{key}/{name}"]) for key in ("param", *MOMENTS)}
        wanted = {f"{key}/{name}": value for key, value in values.items()}
        with _alone_on_purpose():
            load_checkpoint(wanted, storage_reader=HuggingFaceStorageReader(self._folder), no_dist=True)
        return values

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix("param/") for key in self._sizes if key.startswith("param/"))

    def __len__(self) -> int:
        return len(self._sizes) // (1 + len(MOMENTS))


class _Autocast(nn.Module):
    """A network that computes in ``dtype``. Inside the module, because DeepSpeed turns off an autocast around it."""

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.kind = device.type
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``network`` returns."""
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(*args, **kwargs)


class _Sharing(Protocol):
    """How ranks share gradients, optimizer and weights."""

    module: nn.Module

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients are exchanged with the last."""
        ...

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of ``scale · loss``."""
        ...

    def step(self, scale: float) -> float:
        """Unscale, clip and move; returns the norm. If that is not finite, nothing moves. Gradients are zeroed."""
        ...

    def read(self, parameter: nn.Parameter, started: bool) -> dict[str, Tensor]:
        """Parameter and moments, whole; moments are zero if no step was made (not ``started``)."""
        ...

    def write_moments(self, parameters: Mapping[str, nn.Parameter], state: TrainingState) -> None:
        """Put the moments of ``state`` into the optimizer."""
        ...


class _Replicated:
    """Everything on every rank; gradients averaged by DDP."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, clip: float) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._ddp = (
            DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True) if several else None
        )
        self.module = self._ddp or module
        self._optimizer = optimizer
        self._clip = clip
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, scale: float) -> None:
        (loss * scale).backward()

    def step(self, scale: float) -> float:
        if scale != 1:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad.div_(scale)
        norm = float(clip_grad_norm_(self._parameters, self._clip))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def read(self, parameter: nn.Parameter, started: bool) -> dict[str, Tensor]:
        moments = self._optimizer.state[parameter] if started else dict.fromkeys(MOMENTS, torch.zeros_like(parameter))
        return {"param": parameter.clone(), **{key: moments[key].clone() for key in MOMENTS}}

    def write_moments(self, parameters: Mapping[str, nn.Parameter], state: TrainingState) -> None:
        for name, parameter in parameters.items():
            moments = {key: state.tensors[name][key].to(parameter.device, copy=True) for key in MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(state.updates)), **moments}


class _Sharded:
    """Gradients and moments (stage 2), weights too (stage 3), in shards (ZeRO, https://arxiv.org/abs/1910.02054)."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, clip: float, stage: Literal[2, 3]) -> None:
        deepspeed = _import_deepspeed(next(module.parameters()).device)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand: steps differ in their micro-batches
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": WHOLE_BELOW},
        }
        self.module, self._zero, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._optimizer = optimizer
        self._stage = stage

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, scale: float) -> None:
        if scale != 1:
            self._zero.override_loss_scale(scale)
        self.module.backward(loss)

    def step(self, scale: float) -> float:
        self.module.step()
        return math.inf if self._zero.overflow else float(self.module.get_global_grad_norm())

    def read(self, parameter: nn.Parameter, started: bool) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        param: Any = safe_get_full_fp32_param(parameter)
        if not started:
            return {"param": param, **dict.fromkeys(MOMENTS, torch.zeros_like(param))}
        self._link_moments()
        moments: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {"param": param, **moments}

    def write_moments(self, parameters: Mapping[str, nn.Parameter], state: TrainingState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        whole = self._stage == 2
        flats = self._zero.single_partition_of_fp32_groups if whole else self._zero.fp32_partitioned_groups_flat
        for flat in flats:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._optimizer.state[flat] = {"step": torch.tensor(float(state.updates)), **moments}
        self._link_moments()
        for name, parameter in parameters.items():
            for key in MOMENTS:
                value = state.tensors[name][key].to(flats[0].device)
                if whole:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    safe_set_local_optimizer_state(parameter, _partition(value, parameter), key)

    def _link_moments(self) -> None:
        """Let ``safe_*_optimizer_state`` see the moments of all groups.

        DeepSpeed 0.19.8 links them once, after the first group's first step, when the other groups have none yet.
        """
        if self._stage == 2:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()


def _share(value: Tensor, mesh: DeviceMesh, rank: int) -> DTensor:
    """This rank's rows of ``value``; every rank has all of it."""
    chunks = value.detach().to("cpu", torch.float32).chunk(mesh.size())
    rows = chunks[rank].clone() if rank < len(chunks) else value.new_empty((0, *value.shape[1:]), device="cpu")
    stride = value.contiguous().stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=stride)


def _numbers(state: TrainingState) -> str:
    return json.dumps({"step": state.step, "updates": state.updates, "scale": asdict(state.scale)})


def _state(numbers: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> TrainingState:
    found = json.loads(numbers)
    return TrainingState(found["step"], found["updates"], LossScale(**found["scale"]), tensors)


def _partition(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of ``value``, as ZeRO-3 cuts ``parameter``."""
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  (put there by DeepSpeed)
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def _load_parameters(trainable: Mapping[str, nn.Parameter], state: TrainingState) -> None:
    if differing := trainable.keys() ^ state.tensors.keys():
        raise TrainingError(
            f"the checkpoint of step {state.step} trains other parameters than this job: {sorted(differing)[:5]} …",
            "resume with the method that the checkpoint was made with",
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state.tensors[name]["param"])


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told the device, and with what it needs to compile its operator for CPUs within reach."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is there
        remove_stale_locks()
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    compiled = installed_ops.get("deepspeed_shm_comm", False)  # as in our images
    if device.type == "cpu" and not compiled and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise TrainingError("train.strategy: ZeRO on CPUs needs a C++ compiler", "install g++, or choose strategy: ddp")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _warm() -> None:
    _import_deepspeed(torch.device("cpu"))
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


if __name__ == "__main__":
    assert sys.argv[1:] == ["--warm"], "usage: python -m trainer.engine --warm"
    _warm()

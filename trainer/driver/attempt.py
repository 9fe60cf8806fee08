"""One attempt at a run: prepares the data, keeps the ranks alive, says how it ended.

A rank that dies for reasons outside the run (killed, its node gone, a collective cut off) is started again from the
newest commit; a rank that says why it cannot go on (``failure.json``) ends the run at once.

KubeRay starts this program again on a new cluster when a cluster was lost. What the attempt has reported then ends the
run as it did before.
"""

import io
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer import gate
from trainer.checkpoint import Checkpoints
from trainer.driver.kuberay import stop_for_good, under_kuberay
from trainer.mirror import Mirror
from trainer.rundir import RunDirectory, unexpected
from trainer.spec.errors import ClusterError, StoreError, UtaforgeError
from trainer.spec.run import DRIVER_LOG, attempt_begins

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)
FRUITLESS_ATTEMPTS = 3
"""Restarts in a row without a new commit before the run is given up."""
GROUP_START_SECONDS = "600"
"""How long Ray Train waits for all ranks' processes: images are pulled and GPU nodes come up meanwhile."""


def attempt(run_url: str) -> int:
    """Bring the run at ``run_url`` to its result; returns the exit status.

    Raises:
        StoreError: not even the log can be kept there.
    """
    run = RunDirectory(run_url)
    with _log_kept(run) if under_kuberay() else nullcontext():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        return _run(run)


def _run(run: RunDirectory) -> int:
    try:
        run.raise_reported_failure()
        if not run.finished:
            with within_budget(run):
                _prepare(run)
                fit(run)
        if run.store.exists(gate.RETRAIN):
            gate.settle(run)
            gate.mirror(run)
    except UtaforgeError as error:
        run.report_failure(error)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  (nothing that Python can tell of is cured by another cluster)
        told = unexpected(error)
        run.report_failure(told)
        return told.exit_code
    return 0


@contextmanager
def within_budget(run: RunDirectory) -> Iterator[None]:
    """Ends the run, and this process, when the budget's hours are over: KubeRay counts them anew for every cluster.

    What was learnt since the last checkpoint is lost then, so at most ``checkpoint.every`` steps.
    """
    hours = run.job.budget.hours
    if hours is None:
        yield
        return
    left = seconds_left(hours, run.began(), time.time())
    if left <= 0:
        raise _budget_over()
    timer = threading.Timer(left, _give_up, (run,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def seconds_left(hours: float, began: float, now: float) -> float:
    """What is left of a budget.

    Args:
        hours: of the budget.
        began: when the first program of the attempt began, seconds since 1970, by the clock of its machine.
        now: likewise, by this machine's clock, which may be behind.
    """
    return hours * 3600 - max(0.0, now - began)


def _give_up(run: RunDirectory) -> None:
    error = _budget_over()
    log.error("%s", error)
    run.report_failure(error)
    if under_kuberay():
        stop_for_good()
    os._exit(error.exit_code)  # Ray ends the ranks of a program that is gone


def _budget_over() -> ClusterError:
    return ClusterError(
        "the budget's hours are over", "raise budget.hours and submit again: it continues at the last checkpoint"
    )


def fit(run: RunDirectory) -> None:
    """Train on the Ray cluster this process belongs to, through restarts, until the run has its result."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", GROUP_START_SECONDS)
    from ray.train import TrainingFailedError

    checkpoints = Checkpoints(run.store.at("checkpoints"), run.job.checkpoint.keep)
    fruitless = 0
    while True:
        before = checkpoints.newest()
        try:
            _trainer(run).fit()
            if run.finished:
                return
            fruitless, newest = 0, checkpoints.newest()
            stopped = f"stopped at step {newest.step if newest else 0} with a checkpoint"
            log.warning("a machine is being taken away: %s; going on when there is another", stopped)
        except TrainingFailedError as error:
            run.raise_reported_failure()
            after = checkpoints.newest()
            fruitless = 0 if after and (before is None or after.step > before.step) else fruitless + 1
            reason = why_lost(str(error).strip() or type(error).__name__)
            if fruitless == FRUITLESS_ATTEMPTS:
                raise ClusterError(
                    f"the ranks of {run.name} were lost {fruitless} times in a row without a new checkpoint: {reason}",
                    "see logs/ in the run directory; lower checkpoint.every, or give the workers more memory",
                ) from error
            log.warning("a rank was lost: %s", reason)
            log.warning("starting the ranks again from step %d", after.step if after else 0)
            free_places()


def free_places() -> None:
    """Give back the places of ranks that Ray Train has given up: the next ranks would wait for them for ever.

    Its controller does so itself, unless a rank was killed for memory: then it stumbles over that rank's error.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    here = ray.get_runtime_context()
    own: list[Any] = [("creator_job_id", "=", here.get_job_id()), ("state", "!=", "REMOVED")]
    try:
        places: list[Any] = list_placement_groups(here.gcs_address, filters=own)
        for held in places:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(held.placement_group_id)))
    except (RayStateApiException, OSError) as error:
        log.warning("whether places of the lost ranks are still taken cannot be seen: %s", error)


def _prepare(run: RunDirectory) -> None:
    """Make the shards that are not there yet; a run that is continued has its datasets already."""
    prepare = run.job.data.prepare
    if prepare is None or run.has_pinned_data:
        return
    from trainer.data.dataset import newest
    from trainer.data.prepare import prepare as make_shards
    from trainer.data.prepare import progress_lines

    path = getattr(prepare.source, "path", None)
    if path and not Path(path).exists() and newest(run.job.data.train[0].dataset):
        log.info("the songs at %s are not here; their dataset is, so it is trained on as it is", path)
        return
    make_shards(run.job, progress_lines())


def _trainer(run: RunDirectory) -> "TorchTrainer":
    from ray import cloudpickle
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class WithoutHelpers(TorchTrainer):
        """Ray Train without two processes of its own, each 5 s of CPU before the first step.

        One serves Ray Data, the other frees places when the driver dies, as Ray does anyway when its job ends.
        """

        def _create_default_callbacks(self) -> list[Any]:
            needless = DatasetsCallback, PlacementGroupCleanerCallback
            return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's controller needs none of what is imported here
    gpus = run.plan["device"] == "cuda"
    return WithoutHelpers(
        _rank,
        train_loop_config={"run": run.url},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=3600),
        scaling_config=ScalingConfig(
            num_workers=run.plan["ranks"], use_gpu=gpus, resources_per_worker=None if gpus else {"CPU": 1}
        ),
        run_config=RunConfig(name=run.name, failure_config=FailureConfig(max_failures=0), **_ray_storage(run)),
    )


def why_lost(told: str) -> str:
    """Ray's own, short: it names the cause at the start of the last line, but for memory, where advice comes last."""
    if re.search("OutOfMemory|low on memory|out of memory", told):
        return "its machine or pod ran out of memory"
    *_, last = (line for line in told.splitlines() if line.strip() and not line.lstrip().startswith("→"))
    return last.partition(". ")[0].rstrip(".").strip()


def _rank(config: dict[str, str]) -> None:
    """One Ray Train worker; what is heavy is imported here, in the worker."""
    from ray.train.v2._internal.execution.context import get_train_context

    from trainer.worker import run_rank

    told = get_train_context().preemption_context  # ray.train.get_preemption_info would ask another process every step
    run_rank(config["run"], lambda: told.preemption_info is not None)


def _ray_storage(run: RunDirectory) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: beside the run's. Checkpoints are ours and do not go through it."""
    if run.store.local:
        return {"storage_path": str(run.store.local / "ray")}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    scheme, _, path = run.url.partition("://")
    return {"storage_path": f"{path}/ray", "storage_filesystem": PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))}


@contextmanager
def _log_kept(run: RunDirectory) -> Iterator[None]:
    """Copies what this program prints to ``logs/driver.log`` of the run, where it outlives the cluster."""
    screen, errors = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory(prefix="utaforge-driver-") as folder:
        path = Path(folder, "driver.log")
        path.write_bytes(run.store.get_or_none(DRIVER_LOG) or b"")
        mirror = Mirror(run.store, DRIVER_LOG, path)
        with path.open("a", encoding="utf-8", buffering=1) as file:
            sys.stdout, sys.stderr = _Both(screen, file), _Both(errors, file)
            print(attempt_begins(run.attempt))  # noqa: T201
            try:
                yield
            finally:
                sys.stdout, sys.stderr = screen, errors
        with suppress(StoreError):
            mirror.close()


class _Both(io.TextIOBase):
    """Writes to a stream and to a file."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

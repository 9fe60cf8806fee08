"""Ray Train around ``worker``: prepares the data, keeps the ranks alive, says how it ended.

``python -m trainer.driver RUN_URL`` is what the launcher submits to Ray's Jobs API; its exit status is the run's.
A rank that dies for reasons outside the run (killed, its node gone, a collective cut off) is started again from the
newest commit; a rank that says why it cannot go on (``failure.json``) ends the run at once.
"""

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from trainer import gate
from trainer.checkpoint import Checkpoints
from trainer.rundir import FAILURE, RunDirectory
from trainer.spec.errors import ClusterError, UtaforgeError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)
FRUITLESS_ATTEMPTS = 3
"""Restarts in a row without a new commit before the run is given up."""
GROUP_START_SECONDS = "600"
"""How long Ray Train waits for all ranks' processes: images are pulled and GPU nodes come up meanwhile."""


def main(argv: list[str] | None = None) -> int:
    """Run the job whose run directory is named by the argument; returns the exit status."""
    (run_url,) = argv if argv is not None else sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run = RunDirectory(run_url)
    try:
        run.store.delete([FAILURE])
        _prepare(run)
        fit(run)
        if run.store.exists(gate.RETRAIN):
            gate.settle(run)
            gate.mirror(run)
    except UtaforgeError as error:
        run.report_failure(error)
        return error.exit_code
    return 0


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
            return
        except TrainingFailedError as error:
            run.raise_reported_failure()
            after = checkpoints.newest()
            fruitless = 0 if after and (before is None or after.step > before.step) else fruitless + 1
            reason = _first_sentence(error)
            if fruitless == FRUITLESS_ATTEMPTS:
                raise ClusterError(
                    f"the ranks of {run.name} were lost {fruitless} times in a row without a new checkpoint: {reason}",
                    "see logs/ in the run directory; lower checkpoint.every, or give the workers more memory",
                ) from error
            log.warning("a rank was lost: %s", reason)
            log.warning("starting the ranks again from step %d", after.step if after else 0)


def _prepare(run: RunDirectory) -> None:
    """Make the shards that are not there yet; a run that is continued has its datasets already."""
    if run.job.data.prepare is None or run.has_pinned_data:
        return
    from trainer.data.prepare import prepare, progress_lines

    prepare(run.job, progress_lines())


def _trainer(run: RunDirectory) -> "TorchTrainer":
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = run.plan["device"] == "cuda"
    return TorchTrainer(
        _rank,
        train_loop_config={"run": run.url},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=3600),
        scaling_config=ScalingConfig(
            num_workers=run.plan["ranks"], use_gpu=gpus, resources_per_worker=None if gpus else {"CPU": 1}
        ),
        run_config=RunConfig(name=run.name, failure_config=FailureConfig(max_failures=0), **_ray_storage(run)),
    )


def _first_sentence(error: Exception) -> str:
    """Of the last line, where Ray names the cause; what follows there is advice for Ray's own users."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].partition(". ")[0].rstrip(".")


def _rank(config: dict[str, str]) -> None:
    """One Ray Train worker; what is heavy is imported here, in the worker."""
    from trainer.worker import run_rank

    run_rank(config["run"])


def _ray_storage(run: RunDirectory) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: beside the run's. Checkpoints are ours and do not go through it."""
    if run.store.local:
        return {"storage_path": str(run.store.local / "ray")}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    scheme, _, path = run.url.partition("://")
    return {"storage_path": f"{path}/ray", "storage_filesystem": PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))}


if __name__ == "__main__":
    sys.exit(main())

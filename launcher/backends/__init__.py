"""Where Ray clusters come from."""

from launcher.backends.base import Backend, Jobs
from trainer.spec.errors import ClusterError
from trainer.spec.job import Job


def open_backend(job: Job, environment: dict[str, str]) -> Backend:
    """The backend that ``job.cluster`` names, not started yet.

    Args:
        job: the job.
        environment: variables that the run's processes need, beside those they inherit.
    """
    from launcher.backends.local import LocalBackend
    from launcher.plan import plan

    if job.cluster.backend == "local":
        planned = plan(job)
        return LocalBackend(
            planned.ranks, gpus=planned.ranks if planned.device == "cuda" else 0, environment=environment
        )
    raise ClusterError(
        f"cluster.backend: {job.cluster.backend} is not available yet", "write cluster: {backend: local} for now"
    )


__all__ = ["Backend", "Jobs", "open_backend"]

"""Where Ray clusters come from."""

from collections.abc import Mapping

from launcher.backends.base import Backend, Jobs
from launcher.plan import Plan
from trainer.spec import ClusterError, Job


def open_backend(job: Job, plan: Plan, environment: Mapping[str, str]) -> Backend:
    """The backend that ``job.cluster`` names, not started yet.

    Args:
        job: the job.
        plan: its plan.
        environment: variables that the run's processes need, beside those they inherit.
    """
    if job.cluster.backend == "local":
        from launcher.backends.local import LocalBackend

        return LocalBackend(plan.ranks, plan.ranks if plan.device == "cuda" else 0, environment)
    if job.cluster.backend == "kubernetes":
        from launcher.backends.kubernetes import KubernetesBackend

        return KubernetesBackend(job, plan)
    raise ClusterError(f"cluster.backend: {job.cluster.backend} is not available yet", "write local or kubernetes")


__all__ = ["Backend", "Jobs", "open_backend"]

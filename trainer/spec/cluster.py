"""``cluster:``: where the Ray cluster comes from; ``budget:`` and ``retrain:``."""

from typing import Annotated, Literal

from pydantic import Field

from .base import PositiveFloat, PositiveInt, Spec

ProfileName = str


class Local(Spec):
    """A Ray cluster on this machine, started for the run and ended with it."""

    backend: Literal["local"] = "local"
    profile: ProfileName = "cpu"
    workers: PositiveInt = 2


class Kubernetes(Spec):
    """A RayJob through KubeRay."""

    backend: Literal["kubernetes"]
    profile: ProfileName
    workers: PositiveInt | None = None
    """GPUs in all; by default as many as the profile has."""
    spot: bool = False
    namespace: str = "utaforge"
    image: str | None = None


class Cloud(Spec):
    """Virtual machines through ``ray up``."""

    backend: Literal["cloud"]
    profile: ProfileName
    provider: Literal["aws", "gcp"]
    region: str
    workers: PositiveInt | None = None
    spot: bool = False


class Existing(Spec):
    """A Ray cluster that runs already, by the address of its dashboard."""

    backend: Literal["existing"]
    address: str
    profile: ProfileName
    workers: PositiveInt


Cluster = Annotated[Local | Kubernetes | Cloud | Existing, Field(discriminator="backend")]


class Budget(Spec):
    """The most that a run may take; the plan is refused above it and the run stops, with a checkpoint, at it."""

    hours: PositiveFloat | None = None
    usd: PositiveFloat | None = None


class Retrain(Spec):
    """Train again on a schedule, starting from the champion."""

    cron: str
    timezone: str = "UTC"
    when: Literal["new-data", "always"] = "new-data"

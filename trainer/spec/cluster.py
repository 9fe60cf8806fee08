"""``cluster:``: where the Ray cluster comes from; ``budget:`` and ``retrain:``."""

import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .base import PositiveFloat, PositiveInt, Spec, no_password

LABEL = 63
"""https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/: the longest value."""


def _label(value: str) -> str:
    if len(value) > LABEL:
        raise ValueError(f"{value!r} has {len(value)} characters; a Kubernetes label, which it becomes, has {LABEL}")
    return value


def _profile(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value):
        raise ValueError(f"{value!r} is not a profile; write a name like t4x4, not a file")
    return _label(value)


ProfileName = Annotated[str, AfterValidator(_profile)]
"""A hardware shape; ``launcher/profiles`` has the built-in ones and says where others are looked for."""


def _dashboard(value: str) -> str:
    if not re.match(r"https?://[^/]+", value):
        raise ValueError(f"{value!r} is not the address of a Ray dashboard; write it like http://HOST:8265")
    return no_password(value)


def _namespace(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError(f"{value!r} is not a Kubernetes namespace; use a-z, 0-9 and '-', at most 63 characters")
    return value


def _object(value: str) -> str:
    if len(value) > 253 or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value):
        raise ValueError(f"{value!r} cannot be the name of a Kubernetes object; use a-z, 0-9, '-' and '.'")
    return value


def _image(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?", value, re.ASCII):
        raise ValueError(f"{value!r} is not an image; write it like ghcr.io/you/utaforge:1.0")
    return value


ObjectName = Annotated[str, AfterValidator(_object)]


def _cron(value: str) -> str:
    fields = value.split()
    if len(fields) != 5 or not all(re.fullmatch(r"[0-9A-Za-z*/,?#-]+", field) for field in fields):
        raise ValueError(
            f'{value!r} is not a cron schedule; write five fields: minute hour day month weekday, like "0 3 * * 0"'
        )
    return value


def _timezone(value: str) -> str:
    from zoneinfo import available_timezones

    known = available_timezones()
    if known and value not in known:
        near = get_close_matches(value, known, 1)
        raise ValueError(f"{value!r} is no time zone; " + (f"did you mean {near[0]}?" if near else "try Asia/Tokyo"))
    return value


class Local(Spec):
    """A Ray cluster on this machine, started for the run and ended with it."""

    backend: Literal["local"] = "local"
    profile: ProfileName = "cpu"
    workers: PositiveInt = 2


class Queue(Spec):
    """Who decides when a RayJob may start, where the cluster has a queueing system."""

    kind: Literal["kueue", "volcano"]
    name: Annotated[ObjectName, AfterValidator(_label)]
    """Kueue's LocalQueue or Volcano's Queue."""


class Kubernetes(Spec):
    """A RayJob through KubeRay."""

    backend: Literal["kubernetes"]
    profile: ProfileName
    workers: PositiveInt | None = None
    """GPUs in all, by default as many as the profile has; pods where it has none."""
    spot: bool = False
    context: str | None = None
    """Of the kubeconfig; by default its current one, or the cluster that the launcher runs in."""
    namespace: Annotated[str, AfterValidator(_namespace)] = "utaforge"
    image: Annotated[str, AfterValidator(_image)] | None = None
    """The trainer's, as ``make image`` builds it."""
    code: str | None = None
    """A checkout whose ``trainer`` runs instead of the image's; for development."""
    service_account: ObjectName = "utaforge-trainer"
    secrets: tuple[ObjectName, ...] = ()
    """Secrets whose keys become variables of the pods: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …"""
    pull_secrets: tuple[ObjectName, ...] = ()
    """For the image's registry."""
    queue: Queue | None = None
    attempts: PositiveInt = 3
    """Clusters in all: a new one replaces one that lost its head, never one that failed by the job's own fault."""


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
    address: Annotated[str, AfterValidator(_dashboard)]
    profile: ProfileName
    workers: PositiveInt


Cluster = Annotated[Local | Kubernetes | Cloud | Existing, Field(discriminator="backend")]


class Budget(Spec):
    """The most that a run may take: a plan that needs more is refused, and the run ends once its hours are over."""

    hours: PositiveFloat | None = None
    usd: PositiveFloat | None = None


class Retrain(Spec):
    """Train again on a schedule, starting from the champion."""

    cron: Annotated[str, AfterValidator(_cron)]
    timezone: Annotated[str, AfterValidator(_timezone)] = "UTC"
    when: Literal["new-data", "always"] = "new-data"

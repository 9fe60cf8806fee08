"""``cluster:``: where the Ray cluster comes from; ``budget:`` and ``retrain:``."""

import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .base import PositiveFloat, PositiveInt, Spec, no_password

ProfileName = Literal["cpu", "t4x4", "a100", "a100-40", "rtx4090"]
"""A hardware shape; what each is made of stands in ``launcher/profiles.py``."""


def _dashboard(value: str) -> str:
    if not re.match(r"https?://[^/]+", value):
        raise ValueError(f"{value!r} is not the address of a Ray dashboard; write it like http://HOST:8265")
    return no_password(value)


def _namespace(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError(f"{value!r} is not a Kubernetes namespace; use a-z, 0-9 and '-', at most 63 characters")
    return value


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


class Kubernetes(Spec):
    """A RayJob through KubeRay."""

    backend: Literal["kubernetes"]
    profile: ProfileName
    workers: PositiveInt | None = None
    """GPUs in all; by default as many as the profile has."""
    spot: bool = False
    namespace: Annotated[str, AfterValidator(_namespace)] = "utaforge"
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
    address: Annotated[str, AfterValidator(_dashboard)]
    profile: ProfileName
    workers: PositiveInt


Cluster = Annotated[Local | Kubernetes | Cloud | Existing, Field(discriminator="backend")]


class Budget(Spec):
    """The most that a run may take; the plan is refused above it and the run stops, with a checkpoint, at it."""

    hours: PositiveFloat | None = None
    usd: PositiveFloat | None = None


class Retrain(Spec):
    """Train again on a schedule, starting from the champion."""

    cron: Annotated[str, AfterValidator(_cron)]
    timezone: Annotated[str, AfterValidator(_timezone)] = "UTC"
    when: Literal["new-data", "always"] = "new-data"

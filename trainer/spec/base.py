"""What every part of the job schema shares."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr


class Spec(BaseModel):
    """An immutable piece of the job file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _url(schemes: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if not value.startswith(tuple(f"{scheme}:" for scheme in schemes)):
            raise ValueError(f"must be a URL starting with {', '.join(f'{s}:' for s in schemes)}; got {value!r}")
        return value

    return AfterValidator(check)


def _slug(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,34}[a-z0-9])?", value):
        raise ValueError(
            f"{value!r} must be 1 to 36 characters of a-z, 0-9 and '-', not beginning or ending with '-' "
            "(it becomes part of Kubernetes object names)"
        )
    return value


def _reference(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}", value.get_secret_value()):
        raise ValueError("a secret is given by reference only: write ${env:NAME} and set NAME in the environment")
    return value


Secret = Annotated[SecretStr, AfterValidator(_reference)]
"""A secret, written ``${env:NAME}``. It stays a reference in the resolved job and is read where it is used (``reveal``)."""
StoreUrl = Annotated[str, _url(("s3", "gs", "file"))]
"""A place in an object store: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``file:///absolute`` or ``file://./relative``."""
WeightsUrl = Annotated[str, _url(("s3", "gs", "file", "hf", "random", "builtin"))]
"""Where weights come from: a store URL, ``hf://org/repo``, ``random:tiny``, ``random:full`` or ``builtin:pocket``."""
Name = Annotated[str, AfterValidator(_slug)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Json = dict[str, Any]

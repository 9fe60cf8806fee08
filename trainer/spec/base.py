"""What every part of the job schema shares."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, SecretStr


class Spec(BaseModel):
    """An immutable piece of the job file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True)


def no_password(url: str) -> str:
    """``url``, unless it carries a password: job files are kept and shown, so secrets have no place in them.

    Raises:
        ValueError: if it does; the message does not repeat the URL.
    """
    if re.match(r"[a-z0-9+]+://[^/@]*:[^/@]*@", url):
        raise ValueError("has a password in the URL, where everybody would read it; take it out of the URL")
    return url


def _url(*forms: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.match("|".join(_FORMS[form] for form in forms), value):
            raise ValueError(f"{value!r} is not a URL that works here; write {', '.join(forms[:-1])} or {forms[-1]}")
        return no_password(value)

    return AfterValidator(check)


_FORMS = {
    "s3://bucket/prefix": r"s3://[^/]+",
    "gs://bucket/prefix": r"gs://[^/]+",
    "file:///absolute/path": r"file:///",
    "file://./relative/path": r"file://\.\.?(/|$)",
    "hf://org/repo": r"hf://[^/]+/[^/]+",
    "random:tiny": r"random:(tiny|full)$",
    "builtin:pocket": r"builtin:pocket$",
}


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


Secret = Annotated[
    SecretStr,
    AfterValidator(_reference),
    PlainSerializer(SecretStr.get_secret_value, return_type=str, when_used="json"),
]
"""A secret, written ``${env:NAME}``: a reference in the resolved job too, read where it is used (``reveal``)."""
StoreUrl = Annotated[
    str, _url("s3://bucket/prefix", "gs://bucket/prefix", "file:///absolute/path", "file://./relative/path")
]
"""A place in an object store: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``file:///absolute`` or ``file://./relative``."""
WeightsUrl = Annotated[str, _url(*_FORMS)]
"""Where weights come from: a store URL, ``hf://org/repo``, ``random:tiny``, ``random:full`` or ``builtin:pocket``."""
Name = Annotated[str, AfterValidator(_slug)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]

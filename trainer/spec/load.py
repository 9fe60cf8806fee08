"""From a job file to a ``Job``, and from a ``Job`` to what the run directory keeps."""

import ast
import copy
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from pydantic import SecretStr, ValidationError

from . import yaml
from .availability import unavailable
from .base import Spec
from .errors import JobError
from .explain import models_below, schema_faults
from .job import OF_A_RUN, RULES_LATER, Job
from .rules import find_impossible
from .yaml import Document, Fault, FieldPath, overlap

SECRETS: frozenset[FieldPath] = frozenset({("tracking", "password")})
"""Fields of type ``Secret``."""

_DEEPEST = 4
"""Sections inside of sections."""
_STAND_INS: dict[tuple[str, ...], Any] = {
    ("name",): "job",
    ("store",): "s3://bucket",
    ("model", "family"): "musicgen",
    ("model", "pretrained"): "builtin:pocket",
    ("method", "type"): "full",
    ("data", "train"): [{"dataset": "s3://bucket/dataset"}],
    ("train", "steps"): 1,
    ("train", "batch"): {"songs": 1},
}
"""What a job cannot do without: put where it is broken, so that the rest of the job can be judged too."""


def load_job(path: str | Path, overrides: Sequence[str] = (), *, to_run: bool = True) -> Job:
    """The job in a YAML file.

    Args:
        path: of the file.
        overrides: ``path=value`` as given to ``--set``; the value is YAML.
        to_run: the job as it is must be able to run: its files are there, and it asks for nothing that is not
            available yet.

    Raises:
        JobError: with every fault of the file, one a line, as ``file:line:column: path: what is wrong, what to write``.
    """
    document = yaml.read(Path(path), overrides, references=SECRETS)
    _make_source_absolute(document.data)
    faults = list(document.faults)
    job, broken = _validate(document.data, faults)
    if job is not None:
        faults += find_impossible(job, unknown=broken)
        refused = {fault.path for fault in faults}
        later = (*_missing_files(job), *unavailable(job)) if to_run else ()
        faults += [Fault(where, message) for where, message in later if where not in refused]
    if faults:
        raise JobError(document.report(_once(faults)))
    assert job is not None
    return job


def dump_job(job: Job) -> str:
    """``job`` as JSON, every default written out; secrets stay references."""
    return job.model_dump_json(indent=1) + "\n"


def job_from_json(text: str) -> Job:
    """The job that ``dump_job`` wrote; sampling that an earlier version wrote for other families is left out.

    Raises:
        JobError: if it is not one, for example because another version of utaforge wrote it.
    """
    try:
        return Job.model_validate_json(text, strict=True, context=OF_A_RUN)
    except ValidationError as error:
        raise JobError(
            Document("job.json").report(schema_faults(error, Job, SECRETS)),
            "submit the job file again under a new name, or use the version of utaforge that wrote it",
        ) from None


def job_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors; descriptions are the docstrings of the models and of their fields."""
    schema = Job.model_json_schema()
    definitions = {**schema["$defs"], "Job": schema}
    for model in set(models_below(Job)):
        for name, text in _field_docs(model).items():
            definitions[model.__name__]["properties"][name].setdefault("description", text)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "utaforge job"}


def reveal(secret: SecretStr) -> str:
    """The value that a secret refers to.

    Raises:
        JobError: if its environment variable is not set.
    """
    name = secret.get_secret_value().removeprefix("${env:").removesuffix("}")
    if name not in os.environ:
        raise JobError(f"the environment variable {name} is not set, but the job refers to it", f"export {name}=…")
    return os.environ[name]


def _validate(data: dict[str, Any], faults: list[Fault]) -> tuple[Job | None, set[FieldPath]]:
    """The job in ``data``, and the paths that are broken; schema errors are added to ``faults``.

    What is broken is left out, and then what cannot do without it, so that the rest of the job can be judged too.
    """
    broken = {fault.path for fault in faults if fault.mark is None}
    try:
        return _parse(data), broken
    except ValidationError as error:
        found = schema_faults(error, Job, SECRETS)
    faults += found
    rest = copy.deepcopy(data)
    useless = {fault.path for fault in found}
    for _ in range(_DEEPEST):
        broken |= useless
        for path in useless:
            _replace(rest, path)
        try:
            return _parse(rest), broken
        except ValidationError as error:
            useless = {fault.path[:-1] for fault in schema_faults(error, Job, SECRETS)}
    return None, broken


def _missing_files(job: Job) -> Iterator[tuple[FieldPath, str]]:
    """Files of this machine that the job names but that are not there, if the job runs here."""
    if job.cluster.backend != "local":
        return
    named: dict[FieldPath, str | None] = {**job.model.urls(), ("method", "init"): getattr(job.method, "init", None)}
    named |= {
        ("validation", "prompts", index, "style"): each.style for index, each in enumerate(job.validation.prompts)
    }
    for where, url in named.items():
        if url and url.startswith("file://") and not (path := Path(unquote(url.removeprefix("file://")))).exists():
            yield where, f"there is nothing at {path}; correct the path"
    path = getattr(job.data.prepare.source, "path", "://") if job.data.prepare else "://"
    if "://" not in path and not Path(path).exists():
        yield ("data", "prepare", "source", "path"), f"there is nothing at {path}; correct the path"


def _parse(data: dict[str, Any]) -> Job:
    return Job.model_validate_json(json.dumps(data), strict=True, context=RULES_LATER)


def _replace(data: dict[str, Any], path: FieldPath) -> None:
    """Leave the field at ``path`` out of ``data``; where a job cannot do without, put something harmless."""
    needed = [each for each in _STAND_INS if overlap(each, path)]
    for each in needed:
        parent = data
        for part in each[:-1]:
            if not isinstance(parent.get(part), dict):
                parent[part] = {}
            parent = parent[part]
        parent[each[-1]] = _STAND_INS[each]
    if needed or not path:
        return
    while isinstance(path[-1], int):
        path = path[:-1]
    holder = reduce(_inside, path[:-1], cast("Any", data))
    if isinstance(holder, dict):
        cast("dict[str | int, Any]", holder).pop(path[-1], None)


def _inside(data: Any, key: str | int) -> Any:
    """What ``data`` holds at ``key``; nothing if it is not a mapping or list, or has no such key."""
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return None


def _once(faults: list[Fault]) -> list[Fault]:
    """Without second faults of the same place."""
    return list({(fault.path, fault.mark): fault for fault in reversed(faults)}.values())


def _make_source_absolute(data: Any) -> None:
    source = _inside(_inside(_inside(data, "data"), "prepare"), "source")
    path = _inside(source, "path")
    if not isinstance(path, str) or "://" in path:
        return
    if _inside(source, "type") != "huggingface" or Path(path).exists():
        source["path"] = str(Path(path).expanduser().resolve())


def _field_docs(model: type[Spec]) -> dict[str, str]:
    """The strings below the fields of ``model``'s source."""
    tree = ast.parse(inspect.getsource(sys.modules[model.__module__]))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == model.__name__]
    docs: dict[str, str] = {}
    for statement, after in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs[statement.target.id] = inspect.cleandoc(after.value.value)
    return docs

"""Fields that cannot go together, though each is right by itself."""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from .cluster import Cloud, Kubernetes
from .data import ValidationSet
from .families import FAMILIES, PRESETS, codec_of
from .family import adapted
from .model import Full, Lora
from .yaml import Fault, FieldPath, dotted, overlap

if TYPE_CHECKING:
    from .job import Job

Rule = Callable[["Job"], Iterator[Fault]]


def impossible_combinations(job: "Job") -> list[str]:
    """Everything in ``job`` that cannot go together, each as ``path: what is wrong, what to write instead``."""
    return [f"{dotted(fault.path)}: {fault.message}" for fault in find_impossible(job)]


def find_impossible(job: "Job", unknown: Collection[FieldPath] = ()) -> list[Fault]:
    """The same as faults; rules that read a field below or above one of ``unknown`` are left out."""

    def known(fields: tuple[str, ...]) -> bool:
        return not any(overlap(tuple(one.split(".")), other) for one in fields for other in unknown)

    return [fault for fields, rule in _RULES if known(fields) for fault in rule(job)]


def _warmup(job: "Job") -> Iterator[Fault]:
    warmup, steps = job.train.schedule.warmup, job.train.steps
    if warmup > steps:
        yield Fault(("train", "schedule", "warmup"), f"{warmup} is more than train.steps ({steps}); write less")


def _micro_batch(job: "Job") -> Iterator[Fault]:
    seconds, micro = getattr(job.train.batch, "seconds", None), job.train.batch.micro_seconds
    if seconds is not None and micro is not None and micro > seconds:
        yield Fault(
            ("train", "batch", "micro_seconds"), f"{micro:g} is more than the whole batch ({seconds:g}); write less"
        )


def _base_precision(job: "Job") -> Iterator[Fault]:
    if job.model.base_precision == "int8" and isinstance(job.method, Full):
        yield Fault(
            ("model", "base_precision"),
            "int8 is for a frozen base, and method full trains it; write auto",
        )


def _codec(job: "Job") -> Iterator[Fault]:
    codec, possible = codec_of(job.model), FAMILIES[job.model.family].codecs
    if codec not in possible:
        yield Fault(("model", "codec", "name"), f"{job.model.family} does not work with {codec}; write {_or(possible)}")
    elif job.model.pretrained == "builtin:pocket" and codec != "pocket":
        yield Fault(("model", "codec", "name"), f"builtin:pocket was made with pocket, not {codec}; write pocket")


def _builtin(job: "Job") -> Iterator[Fault]:
    if job.model.pretrained == "builtin:pocket" and job.model.family != "musicgen":
        yield Fault(
            ("model", "pretrained"), f"builtin:pocket is a musicgen, not {job.model.family}; name other weights"
        )


def _preset(job: "Job") -> Iterator[Fault]:
    if not isinstance(job.method, Lora) or job.method.preset is None:
        return
    preset, own = job.method.preset, FAMILIES[job.model.family].presets
    if preset not in own:
        belongs = "belongs to another family" if preset in PRESETS else "is not known"
        yield Fault(("method", "preset"), f"{preset} {belongs}; {job.model.family} has {_or(own)}")
    elif job.method.targets != own[preset].targets:
        yield Fault(("method", "targets"), f"preset {preset} has its own targets; remove one of the two")


def _harmful_targets(job: "Job") -> Iterator[Fault]:
    if not isinstance(job.method, Lora) or job.method.allow_harmful_targets:
        return
    family = FAMILIES[job.model.family]
    for index, target in enumerate(job.method.targets or ()):
        if reason := family.harm(target):
            yield Fault(
                ("method", "targets", index),
                f"{target} is refused: {reason}; safe are {_or(family.safe_targets, 'and')}; "
                "to insist, write allow_harmful_targets: true",
            )


def _train_also(job: "Job") -> Iterator[Fault]:
    known = FAMILIES[job.model.family].train_also
    for index, also in enumerate(job.method.train_also if isinstance(job.method, Lora) else ()):
        if also.modules not in known:
            what = f"{job.model.family} can also train {_or(known, 'and')}" if known else "there is nothing to add"
            yield Fault(("method", "train_also", index, "modules"), f"{also.modules} is not known; {what}")


def _something_to_adapt(job: "Job") -> Iterator[Fault]:
    if not isinstance(job.method, Lora):
        return
    family, also = FAMILIES[job.model.family], [each.modules for each in job.method.train_also]
    targets = family.targets(job.method)
    if adapted(family, family.dims, targets) and not adapted(family, family.dims, targets, also):
        what = f"all of them are in {_or(also, 'and')}, which train_also trains in full; add another"
        yield Fault(("method", "targets"), what)


def _adapter_start(job: "Job") -> Iterator[Fault]:
    if isinstance(job.method, Lora) and job.method.pissa and job.method.dora:
        yield Fault(("method", "pissa"), "dora changes what PiSSA has taken out of the base; remove one of the two")
    if isinstance(job.method, Lora) and job.method.pissa and job.method.init:
        yield Fault(("method", "pissa"), "the adapter starts from method.init already; remove one of the two")


def _prompts(job: "Job") -> Iterator[Fault]:
    used = FAMILIES[job.model.family].prompt_fields
    for index, prompt in enumerate(job.validation.prompts):
        for name in ("tags", "lyrics", "style", "style_text", "speaker"):
            if getattr(prompt, name) and name not in used:
                path = ("validation", "prompts", index, name)
                yield Fault(path, f"{job.model.family} does not listen to {name}; remove it, or use {_or(used)}")
        if "style_text" in used and bool(prompt.style) != bool(prompt.style_text):
            given, missing = ("style", "style_text") if prompt.style else ("style_text", "style")
            message = f"{job.model.family} hears a voice only together with what it says; add {missing}, or remove it"
            yield Fault(("validation", "prompts", index, given), message)


def _sampling(job: "Job") -> Iterator[Fault]:
    used = FAMILIES[job.model.family].sampling
    for name in job.validation.sampling.given:
        if name not in used:
            path = ("validation", "sampling", name)
            yield Fault(path, f"{job.model.family} does not listen to {name}; remove it, or use {_or(used)}")


def _stop_if(job: "Job") -> Iterator[Fault]:
    if job.validation.stop_if and not job.validation.prompts:
        yield Fault(("validation", "stop_if"), "there is no audio to judge; add validation.prompts")


def _datasets(job: "Job") -> Iterator[Fault]:
    first: dict[str, int] = {}
    for index, reference in enumerate(job.data.train):
        url = reference.dataset.rstrip("/")
        if first.setdefault(url, index) != index:
            path = ("data", "train", index, "dataset")
            yield Fault(path, f"is the same dataset as data.train.{first[url]}; keep one and raise its weight")
    if isinstance(job.data.validation, ValidationSet) and job.data.validation.dataset.rstrip("/") in first:
        yield Fault(
            ("data", "validation", "dataset"),
            "is also trained on, so the validation loss would mean nothing; write another one, or {fraction: 0.1}",
        )


def _length_limits(job: "Job") -> Iterator[Fault]:
    prepare = job.data.prepare
    if prepare and prepare.max_seconds is not None and prepare.min_seconds > prepare.max_seconds:
        limits = f"{prepare.min_seconds:g} is more than max_seconds ({prepare.max_seconds:g})"
        yield Fault(("data", "prepare", "min_seconds"), f"{limits}; no song would be left; write less")


def _retrain(job: "Job") -> Iterator[Fault]:
    if job.retrain is None:
        return
    if not isinstance(job.method, Lora):
        yield Fault(("method", "type"), "retrain goes on from the champion's adapter, and full has none; write lora")
    elif job.method.pissa:
        yield Fault(("method", "pissa"), "retrain goes on from the champion's adapter, and PiSSA cannot; remove it")
    if not isinstance(job.data.validation, ValidationSet):
        path = ("data", "validation")
        yield Fault(path, "retrain needs songs that stay the same, a dataset of its own; write {dataset: s3://…}")
    if not job.validation.prompts:
        yield Fault(("validation", "prompts"), "retrain compares songs with the champion's; add a prompt")


def _kind(job: "Job") -> Iterator[Fault]:
    if job.kind == "train-vq" and job.model.family != "songbloom":
        yield Fault(("kind",), f"only songbloom has a VQ of its own to train; for {job.model.family} write train")


def _far_files(job: "Job") -> Iterator[Fault]:
    if not isinstance(job.cluster, Kubernetes | Cloud):
        return
    urls: dict[FieldPath, str] = {("store",): job.store, ("model", "pretrained"): job.model.pretrained}
    urls |= {("data", "train", index, "dataset"): each.dataset for index, each in enumerate(job.data.train)}
    urls |= {
        ("validation", "prompts", index, "style"): each.style or "" for index, each in enumerate(job.validation.prompts)
    }
    for path, url in urls.items():
        if url.startswith("file:"):
            yield Fault(
                path, f"{url} is on this machine, where {job.cluster.backend} cannot see it; write s3:// or gs://"
            )


def _login(job: "Job") -> Iterator[Fault]:
    if (job.tracking.username is None) != (job.tracking.password is None):
        missing = "password" if job.tracking.password is None else "username"
        yield Fault(("tracking",), f"username and password go together; add {missing}")


def _or(names: Collection[str], word: str = "or") -> str:
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("train.schedule.warmup", "train.steps"), _warmup),
    (("train.batch",), _micro_batch),
    (("model.base_precision", "method"), _base_precision),
    (("model.family", "model.pretrained", "model.codec"), _codec),
    (("model.family", "model.pretrained"), _builtin),
    (("model.family", "method"), _preset),
    (("model.family", "method"), _harmful_targets),
    (("method",), _adapter_start),
    (("method", "model.family"), _train_also),
    (("method", "model.family"), _something_to_adapt),
    (("model.family", "validation.prompts"), _prompts),
    (("model.family", "validation.sampling"), _sampling),
    (("validation.stop_if", "validation.prompts"), _stop_if),
    (("data.train", "data.validation"), _datasets),
    (("data.prepare",), _length_limits),
    (("retrain", "method", "data.validation", "validation.prompts"), _retrain),
    (("kind", "model.family"), _kind),
    (("store", "model.pretrained", "data.train", "validation.prompts", "cluster"), _far_files),
    (("tracking",), _login),
)
"""The rules, each with the fields it reads."""

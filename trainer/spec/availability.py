"""What a job may already say but utaforge cannot do yet."""

from collections.abc import Iterator

from .data import DemoSource, FolderSource, JsonlSource, Prepare, ProtosSource, SpeakersSource
from .job import Job
from .model import Lora
from .yaml import FieldPath

Unavailable = tuple[FieldPath, str]


def unavailable(job: Job) -> list[Unavailable]:
    """Path and message of every field that asks for something not available yet, with what works today."""
    return [*_model(job), *_method(job), *_data(job), *_judging(job), *_cluster(job)]


def _yet(what: str, today: str) -> str:
    return f"{what} is not available yet; {today}"


def _model(job: Job) -> Iterator[Unavailable]:
    model = job.model
    if job.kind != "train":
        yield ("kind",), _yet(job.kind, "write train")
    for path, url in model.urls().items():
        if url.startswith("hf:"):
            yield (
                path,
                _yet("downloading from Hugging Face", "download it yourself and write file:///path/to/it"),
            )
    if getattr(model, "scheduled_sampling", None):
        yield ("model", "scheduled_sampling"), _yet("scheduled sampling", "remove it")
    if model.base_precision == "int8":
        yield ("model", "base_precision"), _yet("int8", "write auto")


def _method(job: Job) -> Iterator[Unavailable]:
    for index, also in enumerate(job.method.train_also if isinstance(job.method, Lora) else ()):
        path = ("method", "train_also", index)
        if also.schedule:
            yield (*path, "schedule"), _yet("a schedule of its own", "remove it: train.schedule holds for all")
        if (
            also.optimizer
            and also.optimizer.model_copy(
                update={"lr": job.train.optimizer.lr, "weight_decay": job.train.optimizer.weight_decay}
            )
            != job.train.optimizer
        ):
            message = _yet("anything but its own lr and weight_decay", "write the others as in train.optimizer")
            yield (*path, "optimizer"), message


def _data(job: Job) -> Iterator[Unavailable]:
    prepare = job.data.prepare
    if prepare is None:
        return
    base = ("data", "prepare")
    source = prepare.source
    if not isinstance(source, FolderSource | JsonlSource | SpeakersSource | ProtosSource | DemoSource):
        yield (*base, "source", "type"), _yet(f"source {source.type}", "write folder, jsonl, speakers, protos or demo")
    elif not isinstance(source, DemoSource) and "://" in source.path:
        yield (*base, "source", "path"), _yet("reading songs from a URL", "copy them to a folder of this machine")
    yield from (((*base, *path), message) for path, message in _preparation(prepare))


def _preparation(prepare: Prepare) -> Iterator[Unavailable]:
    if prepare.mode != "shards":
        yield ("mode",), _yet(prepare.mode, "write shards")
    if prepare.lyrics.clean:
        yield ("lyrics", "clean"), _yet("cleaning lyrics", "clean the .lyrics files yourself and remove it")
    if prepare.lyrics.transcribe:
        yield ("lyrics", "transcribe"), _yet("transcription", "write .lyrics files yourself and remove it")


def _judging(job: Job) -> Iterator[Unavailable]:
    if job.validation.stop_if:
        yield ("validation", "stop_if"), _yet("stopping on bad audio", "remove it")
    if job.budget.hours is not None and job.cluster.backend != "kubernetes":
        yield ("budget", "hours"), _yet("ending a run after so many hours", "remove it; backend kubernetes can")
    if job.budget.usd is not None:
        yield ("budget", "usd"), _yet("enforcing a budget of money", "remove it")


def _cluster(job: Job) -> Iterator[Unavailable]:
    if job.cluster.backend not in ("local", "kubernetes"):
        yield ("cluster", "backend"), _yet(f"backend {job.cluster.backend}", "write local or kubernetes")

"""Retraining: new data → a run that starts from the champion → its verdict.

The run judges and promotes itself (``trainer.gate``), since the launcher knows no models. Decided here is whether there
is anything to do and where to start from; and never two are at it.
"""

import getpass
import importlib.util
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from launcher.backends.base import Say
from launcher.differences import differences
from launcher.plan import plan
from launcher.runs import Busy, Run, create_or_resume, find_run, free_name, runs_of, runs_of_job
from launcher.submit import check, submit
from trainer.spec import DataError, Job, JobError, UtaforgeError, dump_job
from trainer.spec.data import ValidationSet
from trainer.spec.model import Lora
from trainer.store import open_store

NOTHING_TO_DO, REJECTED = 10, 11
CLAIM_SECONDS = 600.0
"""How long a retraining of another machine that has not submitted its run counts as at work."""
_RETRAIN, _VERDICT = "retrain.json", "verdict.json"
_WHAT_AN_ADAPTER_FITS = re.compile(
    r"(model\.(family|pretrained|version)|method\.(rank|alpha|dora|rslora|targets|train_also\.\d+\.modules))\b"
)
Trainer = Callable[..., int]
"""Runs a module of the trainer with arguments in a process of its own and returns its exit code."""
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a retraining came to.

    Attributes:
        run: that was judged; None if there was nothing to do.
        verdict: as ``verdict.json`` of that run has it.
    """

    run: Run | None = None
    verdict: Document | None = None

    @property
    def exit_code(self) -> int:
        """0 promoted, else ``NOTHING_TO_DO`` or ``REJECTED``."""
        if self.verdict is None:
            return NOTHING_TO_DO
        return 0 if self.verdict["promoted"] else REJECTED


def retrain(job: Job, trainer: Trainer, say: Say, beside: Path | None = None) -> Outcome:
    """Train ``job`` again from its champion if there is a reason to, and see it through to its verdict.

    A retraining that was cut off goes on where it was, unless data, job or champion have changed meanwhile.

    Args:
        job: with a ``retrain`` section.
        trainer: prepares songs, and judges a run that was cut off before its verdict.
        say: takes the lines of progress.
        beside: folder of the job's file, where profiles of one's own may be.

    Raises:
        Busy: another retraining of this job is at work.
        UtaforgeError: it failed; the champion is what it was.
    """
    if job.retrain is None:
        raise JobError(f"{job.name} has no retrain section", 'write retrain: {cron: "0 3 * * 0"} into the job file')
    open_store(job.store).check_writable()
    runs = runs_of_job(runs_of(job.store), job.name)
    newest = _newest_with(_RETRAIN, runs)
    if newest and not newest.store.exists(_VERDICT):
        _refuse_if_at_work(newest)
        if newest.finished:
            say(f"run {newest.name} was cut off before its verdict: judging it now")
            _see_through(trainer("trainer.gate", newest.url), f"run {newest.name} could not be judged")
            return _outcome(newest)
    champion = _champion(job)
    if champion:
        _refuse_if_it_does_not_fit(champion, job)
    _prepare(job, trainer, say)
    data = _newest_versions(job, champion, say)
    judged = _newest_with(_VERDICT, runs)
    seen = _read(judged, "data.json") if judged else champion["data"] if champion else None
    if job.retrain.when == "new-data" and seen and _digests(seen) == _digests(data):
        return Outcome()
    waiting = newest if newest and not newest.finished else None
    chosen, name = candidate(job, champion, data, waiting, runs)
    return _train(chosen, name, champion, data, say, beside)


def candidate(
    job: Job, champion: Document | None, data: Document, waiting: Run | None, runs: Mapping[int, Run]
) -> tuple[Job, str]:
    """The job that a retraining of ``job`` submits, and the name of its run.

    Args:
        job: as its file says.
        champion: the last page of its book.
        data: the versions to train and to be judged on, as ``data.json`` will have them.
        waiting: a retraining that was cut off; it goes on if data, job and champion are what they were.
        runs: of the job, by number.
    """
    if waiting and (told := _read(waiting, _RETRAIN)) and told["champion"] == (champion["number"] if champion else 0):
        same = starting_from(job, getattr(waiting.job.method, "init", None))
        if _read(waiting, "data.json") == data and not differences(waiting.job, same):
            return same, waiting.name
    return starting_from(job, champion["adapter"]) if champion else job, free_name(job.name, runs)


def starting_from(job: Job, adapter: str | None) -> Job:
    """``job`` with ``adapter`` as ``method.init``."""
    return job.model_copy(update={"method": job.method.model_copy(update={"init": adapter})})


def prepare(job: Job, trainer: Trainer) -> int:
    """Make the songs of ``job`` into shards on this machine; returns the trainer's exit code."""
    with tempfile.TemporaryDirectory(prefix="utaforge-") as folder:
        resolved = Path(folder, "job.json")
        resolved.write_text(dump_job(job), encoding="utf-8")
        return trainer("trainer.data", str(resolved))


def _train(job: Job, name: str, champion: Document | None, data: Document, say: Say, beside: Path | None) -> Outcome:
    planned = plan(job, beside)
    check(job, planned)
    run = Run(runs_of(job.store).at(name))
    with _claim(run, int(champion["number"]) if champion else 0):
        run.store.put("data.json", json.dumps(data, indent=1).encode())
        chosen = create_or_resume(job, planned.as_json(), name)
        say(f"{chosen.news}; " + (f"the champion is {champion['run']}" if champion else "there is no champion yet"))
        submit(job, planned, chosen, say)
    return _outcome(chosen.run)


def _outcome(run: Run) -> Outcome:
    verdict = _read(run, _VERDICT)
    if verdict is None:
        raise UtaforgeError(f"run {run.name} ended without a verdict", "retrain again: it will be judged then")
    return Outcome(run, verdict)


def _newest_with(path: str, runs: Mapping[int, Run]) -> Run | None:
    return next((runs[number] for number in sorted(runs, reverse=True) if runs[number].store.exists(path)), None)


def _champion(job: Job) -> Document | None:
    """The last page of the job's book (``trainer.champion`` writes it)."""
    book = open_store(job.store).at(f"champions/{job.name}")
    pages = [entry.path for entry in book.list()]
    return cast("Document", json.loads(book.get(pages[-1]))) if pages else None


def _refuse_if_it_does_not_fit(champion: Document, job: Job) -> None:
    assert isinstance(job.method, Lora), "a rule of the job"
    before = starting_from(find_run(job.store, champion["run"]).job, job.method.init)
    lines = [line for line in differences(before, job) if _WHAT_AN_ADAPTER_FITS.match(line)]
    if lines:
        raise JobError(
            f"the champion {champion['run']} does not fit this job; these fields differ:\n"
            + "\n".join(f"  {line}" for line in lines),
            "put them back, or give the job another name, under which it has no champion yet",
        )


def _prepare(job: Job, trainer: Trainer, say: Say) -> None:
    if job.data.prepare is None:
        return
    if importlib.util.find_spec("torch") is None:
        say("songs are not prepared here, since only the launcher is installed: run utaforge prepare where they lie")
        return
    _see_through(prepare(job, trainer), f"the songs of {job.name} could not be prepared")


def _newest_versions(job: Job, champion: Document | None, say: Say) -> Document:
    """What ``data.json`` will hold: the newest training songs, and the validation songs that stay the same."""
    assert isinstance(job.data.validation, ValidationSet), "a rule of the job"
    newest = _newest_version(job.data.validation.dataset)
    frozen = champion["data"].get("validation") if champion else None
    if champion and frozen and frozen["url"] != newest["url"]:
        raise JobError(
            f"the champion {champion['run']} was judged on {frozen['url']}, and this job names {newest['url']}",
            "put data.validation back, or give the job another name, under which it has no champion yet",
        )
    if frozen and frozen["digest"] != newest["digest"]:
        told = f"stays at version {frozen['version']}, on which champions are judged; {newest['version']} is not used"
        say(f"{newest['url']} {told}")
    train = [_newest_version(reference.dataset) for reference in job.data.train]
    return {"train": train, "validation": frozen or newest}


def _newest_version(url: str) -> Document:
    """What names the newest version of a dataset (``trainer.data.dataset`` writes these manifests)."""
    store = open_store(url)
    paths = [entry.path for entry in store.list("versions")]
    if not paths:
        raise DataError(f"{url} holds no dataset", "make one with `utaforge prepare JOB`, or correct the URL")
    digest: str = json.loads(store.get(paths[-1]))["digest"]
    return {"url": store.url, "version": int(PurePosixPath(paths[-1]).stem), "digest": digest}


def _digests(data: Document) -> list[tuple[str, str]]:
    """Which songs are trained on; equal digests are equal songs."""
    return [(pin["url"], pin["digest"]) for pin in data["train"]]


@contextmanager
def _claim(run: Run, champion: int) -> Generator[None]:
    """Say in the run directory who is at it and from which champion it starts; afterwards, that nobody is.

    Raises:
        Busy: somebody else has taken the same name at this moment.
    """
    by = {"host": socket.gethostname(), "user": getpass.getuser(), "pid": os.getpid(), "time": time.time()}
    if not run.store.create(_RETRAIN, json.dumps({"champion": champion, "by": by}).encode()):
        _refuse_if_at_work(run)
        run.store.put(_RETRAIN, json.dumps({"champion": champion, "by": by}).encode())
    try:
        yield
    finally:
        run.store.put(_RETRAIN, json.dumps({"champion": champion, "by": None}).encode())


def _refuse_if_at_work(run: Run) -> None:
    told = _read(run, _RETRAIN)
    if told and (by := told["by"]) and _claim_holds(by):
        raise Busy(
            f"{by['user']} on {by['host']} is retraining {run.name} at this moment",
            "wait until that is over; there is nothing to do here meanwhile",
        )
    try:
        if not run.finished:
            run.refuse_if_running()
    except Busy as busy:
        raise Busy(busy.problem, f"wait for it (utaforge logs -f {run.name}), or utaforge cancel {run.name}") from None


def _claim_holds(by: Document) -> bool:
    if by["host"] != socket.gethostname():
        return time.time() - by["time"] < CLAIM_SECONDS
    try:
        os.kill(by["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return by["pid"] != os.getpid()


def _read(run: Run, path: str) -> Document | None:
    told = run.store.get_or_none(path)
    return cast("Document", json.loads(told)) if told else None


def _see_through(code: int, problem: str) -> None:
    """Raise for a module of the trainer that has told its own problem already."""
    if code:
        error = UtaforgeError(problem, "see above")
        error.exit_code = code
        raise error

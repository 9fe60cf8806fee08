"""The champion of a job: the adapter that retraining starts from and has to beat.

``<store>/champions/<job>/000001.json``, ``000002.json``, … tell who has been it; the highest number is it now. Each is
created conditionally, so of two who promote at the same moment one is refused. MLflow's alias ``champion`` mirrors this
(``trainer.registry``). Torch-free.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from trainer.rundir import RunDirectory
from trainer.spec import Job
from trainer.spec.errors import JobError
from trainer.store import Store, open_store


@dataclass(frozen=True)
class Champion:
    """One entry of a job's book of champions.

    Attributes:
        number: from 1.
        run: name of the run that made it.
        adapter: URL of a folder in PEFT's format.
        held_out_loss: at the end of that run.
        data: the versions that it was trained and judged on, as in that run's ``data.json``.
        by: ``gate``, or the person who chose it.
        time: seconds since 1970.
    """

    number: int
    run: str
    adapter: str
    held_out_loss: float
    data: dict[str, Any]
    by: str
    time: float


def champion_of(job: Job) -> Champion | None:
    """The champion of ``job`` now; None if nobody has been promoted yet."""
    numbers = [int(PurePosixPath(entry.path).stem) for entry in _book(job).list()]
    return champion_at(job, max(numbers)) if numbers else None


def champion_at(job: Job, number: int) -> Champion:
    """The champion of that number."""
    return Champion(**json.loads(_book(job).get(_page(number))))


def promote(run: RunDirectory, by: str, number: int) -> Champion | None:
    """Make ``run`` the champion of that number.

    Args:
        run: finished.
        by: ``gate``, or who wants it.
        number: one more than that of the champion it follows.

    Returns:
        The new champion, or None if somebody else has been promoted meanwhile.

    Raises:
        JobError: the run has no result yet, or no adapter.
    """
    told = run.store.get_or_none("result.json")
    result = json.loads(told) if told else {}
    if "adapter" not in result:
        reason = "it trained the whole model" if result else "it is not finished"
        raise JobError(f"run {run.name} has no adapter to promote: {reason}", "name a finished run of method lora")
    adapter = run.store.at(result["adapter"]).url
    new = Champion(number, run.name, adapter, result["loss_after"], run.pinned_data, by, time.time())
    content = json.dumps(asdict(new), ensure_ascii=False, indent=1).encode()
    return new if _book(run.job).create(_page(number), content) else None


def _book(job: Job) -> Store:
    return open_store(job.store).at(f"champions/{job.name}")


def _page(number: int) -> str:
    return f"{number:06d}.json"

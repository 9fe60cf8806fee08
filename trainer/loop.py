"""The training loop."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from trainer.data.loader import Loader
from trainer.engine import Engine, StepResult, learning_rate
from trainer.spec import Job

log = logging.getLogger(__name__)


class Room(Protocol):
    """What happens between steps."""

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics to the journal."""
        ...

    def evaluate(self, step: int) -> float:
        """Held-out loss with the current weights, recorded."""
        ...

    def listen(self, step: int) -> None:
        """Render the validation prompts with the current weights."""
        ...

    def commit(self, step: int, position: tuple[int, int], held_out: float) -> None:
        """Put a checkpoint of this moment into the store, beside training; ``held_out`` is infinite if not measured."""
        ...


def train(job: Job, engine: Engine, steps: Loader, room: Room) -> None:
    """Train from where ``engine`` and ``steps`` stand to ``job.train.steps``.

    A notice that a rank's machine is being taken away ends it earlier, with a checkpoint of that step.

    Every random draw of a step follows from the job's seed, the step and the rank, so that going on after a restart
    needs no generator's state. Raises ``TrainingError`` if the loss or the gradient is not finite.
    """
    first, last = engine.steps + 1, job.train.steps
    if first == 1:
        room.evaluate(0)
        room.listen(0)
    pace = Pace(last)
    for step, data in zip(range(first, last + 1), steps, strict=False):
        lr = learning_rate(job.train, step)
        result = engine.step(data.micro, lr, seed=(job.train.seed, step))
        pace.add(result, steps.wait_seconds)
        listening = step % job.validation.every == 0 or step == last
        committing = step % job.checkpoint.every == 0 or step == last
        if step % job.train.log_every == 0 or listening or committing:
            room.record(step, {**_metrics(result, lr), **pace.take(step, result.loss)})
        with pace.paused():
            held_out = room.evaluate(step) if listening or committing else math.inf
            if listening:
                room.listen(step)
            if committing or result.noticed:
                room.commit(step, data.position, held_out)
        if result.noticed:
            return


class Pace:
    """How fast training goes; validation and checkpoints do not count."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._begin = time.perf_counter()
        self._clear()

    def add(self, result: StepResult, wait_seconds: float) -> None:
        """Count a step."""
        self._steps += 1
        self._tokens += result.tokens
        self._frames += result.frames
        self._waited += wait_seconds

    def take(self, step: int, loss: float) -> dict[str, float]:
        """The rates since the last call; says a line about them."""
        seconds = time.perf_counter() - self._begin
        rate = self._steps / seconds
        left = (self._last - step) / rate
        log.info("step %d/%d · loss %.4f · %.2f steps/s · %s left", step, self._last, loss, rate, duration(left))
        rates = {
            "speed/steps_per_second": rate,
            "speed/tokens_per_second": self._tokens / seconds,
            "speed/data_wait_share": min(self._waited / seconds, 1.0),
        }
        self._begin = time.perf_counter()
        self._clear()
        return rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def _clear(self) -> None:
        self._steps, self._tokens, self._frames, self._waited = 0, 0.0, 0.0, 0.0


def duration(seconds: float) -> str:
    """``75.2`` → ``1m 15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _metrics(result: StepResult, lr: float) -> dict[str, float]:
    terms = {f"train/{term}": mean for term, mean in result.terms.items()}
    return {"train/loss": result.loss, **terms, "train/grad_norm": result.grad_norm, "train/lr": lr}

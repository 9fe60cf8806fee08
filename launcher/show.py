"""What the commands print: tables on a terminal, plain text elsewhere, JSON on request."""

import json
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from launcher.backends.base import Say
from launcher.doctor import Check
from launcher.plan import Plan
from launcher.profiles import GIB
from launcher.rehearse import Rehearsal
from launcher.retrain import Outcome as Retraining
from launcher.runs import Run, Status
from launcher.submit import Outcome
from launcher.why import Cause

Row = tuple[str, str]
_COUNTED = re.compile(r"(?P<kind>step|prepared) (?P<done>\d+)/(?P<total>\d+)(?P<rest> .* left)$")
_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}


def console() -> Console:
    """Standard output; lines are never wrapped or coloured when they go to a file or a pipe."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def as_json(value: Any) -> None:
    """Print JSON for programs."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def plan(planned: Plan) -> None:
    """Print a plan."""
    _rows(f"plan of {planned.job}", _plan_rows(planned))


def money(planned: Plan) -> str:
    """What a plan costs."""
    if planned.usd is None:
        return f"{'none' if planned.backend == 'local' else 'unknown'}: {planned.usd_basis}"
    return f"{planned.usd:,.2f} USD ({planned.usd_basis})"


def manifests(planned: Plan, documents: Sequence[dict[str, Any]]) -> None:
    """Print what would be sent, as YAML that ``kubectl apply`` takes; the plan stands above as a comment."""
    lines = [f"plan of {planned.job}", *(f"  {name}: {value}" for name, value in _plan_rows(planned))]
    sys.stdout.write("".join(f"# {line}\n" for line in lines))
    for document in documents:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        sys.stdout.write(f"---\n{text}")


def _plan_rows(planned: Plan) -> list[Row]:
    memory = planned.memory
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations", "overhead")}
    split = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    micro = f"{planned.ranks} ranks × about {planned.micro_batches} × {planned.micro_seconds:g} s"
    sizes = f"{_count(planned.trained + planned.frozen)} parameters, {_count(planned.trained)} trained"
    machines = f"{planned.machines} × {planned.profile}" if planned.machines > 1 else planned.profile
    return [
        (
            "model",
            f"{planned.family}, {sizes}",
        ),
        ("method", planned.method),
        ("cluster", f"{planned.backend}, {machines}, {planned.ranks} ranks on {planned.device}"),
        ("how", f"{planned.strategy}, {planned.precision}"),
        ("batch", f"{planned.batch_seconds:g} s = {micro}"),
        ("steps", f"{planned.steps:,} ({_hours(planned.steps * planned.batch_seconds / 3600)} of audio)"),
        ("memory", f"{_size(memory.total)} of {_size(planned.device_bytes)} on each rank: {split}"),
        (
            "time",
            f"{_hours(planned.hours)} ({planned.hours_basis})" if planned.hours is not None else planned.hours_basis,
        ),
        ("money", money(planned)),
        ("songs", ", ".join(f"{name} {value}" for name, value in planned.sampling.items())),
        *(("note", check) for check in planned.checks),
    ]


@contextmanager
def following() -> Generator[Say]:
    """Takes a run's lines. On a terminal those that count (``step 5/120 · … left``) become a bar below the others."""
    if not sys.stdout.isatty():
        yield click.echo
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"))
    with Progress(*columns, console=console(), transient=True) as bars:
        bar: TaskID | None = None
        kind = ""

        def say(line: str) -> None:
            nonlocal bar, kind
            counted = _COUNTED.match(line)
            if counted is None:
                bars.console.print(escape(line))
                return
            if bar is None or counted["kind"] != kind:
                if bar is not None:
                    bars.remove_task(bar)
                kind = counted["kind"]
                bar = bars.add_task(kind, rest="")
            bars.update(bar, completed=int(counted["done"]), total=int(counted["total"]), rest=escape(counted["rest"]))

        yield say


def status(found: Status) -> None:
    """Print how one run stands."""
    rows = [
        ("state", str(found)),
        ("loss", _loss(found.loss)),
        ("attempts", f"{found.attempts}, the last on {found.backend}" if found.attempts else "none"),
        ("heard of", found.updated or "never"),
        ("run directory", found.url),
    ]
    if found.problem:
        rows += [("problem", found.problem), ("cure", found.cure or "")]
    _rows(f"run {found.name}", rows)


def runs(found: Sequence[Status], store_url: str) -> None:
    """Print all runs."""
    if not found:
        console().print(f"no runs in {escape(store_url)}")
        return
    table = Table("run", "state", "step", "loss", "attempts", "heard of", box=_box())
    for one in found:
        state = f"[{_STYLES[one.state]}]{one.state}[/]"
        table.add_row(one.name, state, f"{one.step}/{one.steps}", _loss(one.loss), str(one.attempts), one.updated or "")
    console().print(table)


def why(found: Status, causes: Sequence[Cause]) -> None:
    """Print how a run stands and why."""
    out = console()
    out.print(f"run {found.name}: [{_STYLES[found.state]}]{found}[/]")
    if not causes:
        out.print("nothing stands in its way" if found.state == "running" else "it went well")
    for number, cause in enumerate(causes, 1):
        out.print(f"{number}. {escape(cause.what)}", style="bold")
        out.print(f"   seen in {escape(cause.evidence)}")
        out.print(f"   → {escape(cause.cure)}")


def checks(found: Sequence[Check]) -> None:
    """Print what the doctor found."""
    out = console()
    for check in found:
        mark = "[green]ok  [/]" if check.ok else "[red]FAIL[/]"
        out.print(f"{mark} {escape(check.name)}: {escape(check.found)}")
        if not check.ok:
            out.print(f"       → {escape(check.cure)}")


def summary(outcome: Outcome, store_option: str) -> None:
    """Print what a finished run has brought."""
    run, result = outcome.run, outcome.run.result or {}
    before, after = result.get("loss_before"), result.get("loss_after")
    rows = [
        ("held-out loss", f"{_loss(before)} → {_loss(after)} after {result.get('steps', run.job.train.steps)} steps"),
        (
            "adapter" if run.job.method.type == "lora" else "model",
            _place(run, result.get("adapter") or result.get("model")),
        ),
        ("checkpoints", _place(run, "checkpoints")),
        ("audio", _place(run, "audio") if run.job.validation.prompts else "none: the job has no validation.prompts"),
        ("MLflow", _mlflow(run)),
        ("generate more", f"utaforge generate {run.name}{store_option} --tags 'gentle, 子守唄' --seconds 8"),
        ("took", _clock(outcome.seconds)),
    ]
    _rows(f"run {run.name} is finished", rows)


def retraining(job_name: str, outcome: Retraining) -> None:
    """Print what a retraining came to."""
    if outcome.run is None or outcome.verdict is None:
        console().print(f"nothing to do: {escape(job_name)} has no new songs since it was last trained")
        return
    run, verdict = outcome.run, outcome.verdict
    rows = [
        ("held-out loss", f"{_loss(verdict['before'])} → {_loss(verdict['after'])}"),
        *(("reason", reason) for reason in verdict["reasons"]),
        ("report", _place(run, "report.md")),
        ("audio", _place(run, "audio")),
    ]
    _rows(f"run {run.name} is {'promoted' if verdict['promoted'] else 'rejected'}", rows)


def rehearsal(done: Rehearsal, say: Say) -> None:
    """Say what a rehearsal has run and what it has not."""
    say(f"{done.name} is rehearsed, in {_clock(done.seconds)}; everything lies in {done.folder}")
    for mark, lines in (("ran", done.exercised), ("had another value", done.replaced)):
        for line in lines:
            say(f"  {mark}: {line}")


def _rows(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=escape(title), title_justify="left", show_header=False, box=_box())
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join([title, *(f"  {name}: {value}" for name, value in rows), ""]))
        return
    for name, value in rows:
        table.add_row(name, escape(value))
    console().print(table)


def _box() -> box.Box | None:
    return box.ROUNDED if sys.stdout.isatty() else None


def _place(run: Run, path: object) -> str:
    """A place in the run directory, as a path where this machine has it."""
    place = run.store.at(str(path)) if path else run.store
    return str(place.local or place.url)


def _mlflow(run: Run) -> str:
    uri = run.job.tracking.mlflow
    if uri and uri.startswith("http"):
        return uri
    if run.job.cluster.backend != "local":
        return f"after: utaforge sync {run.name}"
    return "http://127.0.0.1:5000 after: make ui"


def _loss(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.1f} {name}"
    return f"{parameters:,}"


def _hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

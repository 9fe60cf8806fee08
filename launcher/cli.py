"""The commands: parse, call, print. What a command needs is imported by that command, so that ``--help`` is quick."""

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.runs import Run, Status
    from trainer.spec import Job

DEFAULT_STORE = "file://./store"
EPILOG = """\b
Exit codes
  0    done
  1    anything that has no code of its own
  2    the job file is wrong
  3    the store refuses or is out of reach
  4    songs or a dataset cannot be used
  5    the cluster did not start, is out of reach, or lost the run
  6    training cannot go on
  10   retrain: there was nothing to do
  11   retrain: the candidate did not beat the champion
  12   the run, or another retraining of the job, is at work
  130  interrupted; submit again to continue

\b
Variables
  UTAFORGE_STORE  store of commands that take a RUN (file://./store)
  UTAFORGE_HOME   what this machine's runs share (./.utaforge)
  UTAFORGE_DEBUG  1: show tracebacks and everything that Ray says
"""
F = TypeVar("F", bound=Callable[..., Any])


def main() -> None:
    """The command ``utaforge``. A person sees a problem and its cure, never a traceback."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        return int(cli.main(list(arguments), prog_name="utaforge", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        _complain("interrupted")
        return 130
    except click.ClickException as error:
        error.show()
        return 1
    except Exception as error:  # noqa: BLE001  (the last resort: the traceback goes to a file)
        from trainer.spec.errors import UtaforgeError

        if not isinstance(error, UtaforgeError):
            return _unexpected(error)
        _complain(str(error))
        return error.exit_code


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="utaforge")
def cli() -> None:
    """Fine-tune open music models on a Ray cluster from one YAML file."""


def _job_argument(command: F) -> F:
    command = click.argument("job_path", metavar="JOB")(command)
    return click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a field.")(command)


def _store_options(command: F) -> F:
    command = click.option("--job", "job_path", metavar="JOB", help="Use this job's store.")(command)
    return click.option("--store", "store_url", metavar="URL", help="The store; else UTAFORGE_STORE.")(command)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@_job_argument
@_json
def plan(job_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """What a job will do and take, before it does it."""
    from launcher import show
    from launcher.plan import plan as make_plan
    from trainer.spec import load_job

    planned = make_plan(load_job(job_path, overrides), Path(job_path).parent)
    if as_json:
        show.as_json(planned.as_json())
    else:
        show.plan(planned)


@cli.command()
@_job_argument
@_json
def prepare(job_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Make a job's songs into shards, here and now; submit does it too where it is missing."""
    from launcher.retrain import prepare as make_shards
    from trainer.spec import load_job

    job = load_job(job_path, overrides)
    if code := make_shards(job, _trainer):
        raise click.exceptions.Exit(code)
    _tell_dataset(job, as_json)


@cli.command()
@_job_argument
@click.option("--run", "run_name", metavar="NAME", help="Continue this run, or start one of this name.")
@click.option("--yes", is_flag=True, help="Do not ask, even where it may cost money.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what would be sent, as YAML; send nothing.")
def submit(job_path: str, overrides: tuple[str, ...], run_name: str | None, yes: bool, dry_run: bool) -> None:
    """Run a job: start the cluster, train, follow. The same job again continues where it was."""
    from launcher import show
    from launcher.plan import plan as make_plan
    from launcher.runs import create_or_resume
    from launcher.submit import check
    from launcher.submit import submit as submit_run
    from trainer.spec import load_job

    job = load_job(job_path, overrides)
    planned = make_plan(job, Path(job_path).parent)
    if dry_run:
        _show_manifests(job, planned, run_name or job.name)
        return
    show.plan(planned)
    if planned.backend != "local" and not yes:
        click.confirm(f"The bill for this is {show.money(planned)}. Go on?", abort=True)
    check(job, planned)
    chosen = create_or_resume(job, planned.as_json(), run_name)
    click.echo(chosen.news)
    with show.following() as say:
        outcome = submit_run(job, planned, chosen, say)
    show.summary(outcome, "" if _default_store() == job.store else f" --store {job.store}")


@cli.command()
@_job_argument
def retrain(job_path: str, overrides: tuple[str, ...]) -> None:
    """Train a job again from its champion, if there are new songs; promote what beats it. Asks nothing."""
    from launcher import show
    from launcher.retrain import retrain as retrain_job
    from trainer.spec import load_job

    job = load_job(job_path, overrides)
    with show.following() as say:
        outcome = retrain_job(job, _trainer, say, Path(job_path).parent)
    show.retraining(job.name, outcome)
    raise click.exceptions.Exit(outcome.exit_code)


@cli.command()
@click.argument("run_name", metavar="RUN")
@_store_options
def promote(run_name: str, store_url: str | None, job_path: str | None) -> None:
    """Make a run its job's champion, whatever the gate said of it; also an older one again."""
    found = _run(run_name, store_url, job_path)
    raise click.exceptions.Exit(_trainer("trainer.gate", found.url, "--promote"))


@cli.group()
def render() -> None:
    """Print Kubernetes manifests."""


@render.command()
@_job_argument
@click.option("--image", metavar="IMAGE", help="The launcher's image.")
def cronjob(job_path: str, overrides: tuple[str, ...], image: str | None) -> None:
    """The CronJob that retrains a job in the cluster, on the schedule of its retrain section."""
    from launcher.profiles import text_of_own
    from launcher.render.cronjob import IMAGE, as_yaml
    from launcher.render.cronjob import cronjob as manifests
    from trainer.spec import load_job

    job = load_job(job_path, overrides, to_run=False)
    text = Path(job_path).read_text(encoding="utf-8")
    profile = text_of_own(job.cluster.profile, Path(job_path).parent)
    made = manifests(job, text, profile=profile, image=image or IMAGE, overrides=overrides)
    click.echo(as_yaml(made), nl=False)


@cli.command()
@click.argument("run_name", metavar="RUN")
@_store_options
@_json
def status(run_name: str, store_url: str | None, job_path: str | None, as_json: bool) -> None:
    """How a run stands."""
    from launcher import show

    found = _run(run_name, store_url, job_path).status()
    if as_json:
        show.as_json(found.as_json())
    else:
        show.status(found)


@cli.command(name="list")
@_store_options
@_json
def list_(store_url: str | None, job_path: str | None, as_json: bool) -> None:
    """All runs in the store."""
    from launcher import show
    from launcher.listing import all_runs

    url = _store(store_url, job_path)
    found: list[Status] = all_runs(url)
    if as_json:
        show.as_json([one.as_json() for one in found])
    else:
        show.runs(found, url)


@cli.command()
@click.argument("run_name", metavar="RUN")
@click.option("-f", "--follow", is_flag=True, help="Stay until the run is over.")
@_store_options
def logs(run_name: str, follow: bool, store_url: str | None, job_path: str | None) -> None:
    """What a run has said; -f: and what it says."""
    from launcher.submit import Reader

    found = _run(run_name, store_url, job_path)
    live = found.live_log() if follow else None
    if live is not None:
        readable = Reader()
        for line in live:
            if (shown := readable(line)) is not None:
                click.echo(shown)
        end = found.status()
        click.echo(f"run {found.name} is {end}{f': {end.problem}' if end.problem else ''}", err=True)
        return
    stored = found.stored_logs()
    for name, text in stored.items():
        click.echo(f"==> {name} <==\n{text}", nl=not text.endswith("\n"))
    if not stored:
        click.echo(f"run {found.name} has no logs yet; -f reads along while it runs", err=True)


@cli.command()
@click.argument("run_name", metavar="RUN")
@_store_options
def cancel(run_name: str, store_url: str | None, job_path: str | None) -> None:
    """Stop a run that is at work; submitting its job again continues it."""
    found = _run(run_name, store_url, job_path)
    found.cancel()
    click.echo(f"run {found.name} was stopped; its last checkpoint is of step {found.newest_commit()}")


@cli.command()
@click.argument("run_name", metavar="RUN")
@click.option("--tags", help="Description of the song.")
@click.option("--lyrics", help="Its lyrics, for families that sing.")
@click.option("--seconds", type=float, help="Its length.")
@click.option("--seed", type=int)
@click.option("--n-samples", type=int, help="Songs for each prompt.")
@click.option("--input-jsonl", metavar="FILE", help="Prompts, one JSON object a line.")
@click.option("--guidance", type=float, help="As in the job by default, like all of its sampling.")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--sampler", type=click.Choice(["euler", "heun", "pingpong"]))
@click.option("--sampling-steps", type=int)
@click.option("--flow-temperature", type=float)
@click.option("--step", metavar="STEP", help="best, last, base (without the adapter) or a number.")
@click.option("--format", type=click.Choice(["wav", "flac", "mp3"]))
@click.option("--output", metavar="DIR", help="Where the songs go.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]))
@_store_options
@_json
def generate(
    run_name: str, store_url: str | None, job_path: str | None, as_json: bool, **options: str | float | None
) -> None:
    """Make songs with what a run has learnt."""
    given = [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    found = _run(run_name, store_url, job_path)
    flags = ["--json"] if as_json else []
    raise click.exceptions.Exit(_trainer("trainer.validation.generate", found.url, *given, *flags))


@cli.command()
@click.argument("run_name", metavar="RUN")
@_store_options
@_json
def why(run_name: str, store_url: str | None, job_path: str | None, as_json: bool) -> None:
    """Why a run stands as it does: causes, what shows them, and their cures."""
    from launcher import show
    from launcher.snapshot import gather
    from launcher.why import diagnose

    seen = gather(_run(run_name, store_url, job_path))
    causes = diagnose(seen)
    if as_json:
        show.as_json({"run": seen.status.as_json(), "causes": [cause.as_json() for cause in causes]})
    else:
        show.why(seen.status, causes)


@cli.command()
@click.argument("run_name", metavar="RUN", required=False)
@click.option("--all", "every", is_flag=True, help="All runs in the store.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_store_options
def down(run_name: str | None, every: bool, yes: bool, store_url: str | None, job_path: str | None) -> None:
    """Stop runs and remove all that they have on clusters; their run directories stay."""
    from launcher.down import remains, take_down
    from launcher.runs import Run, runs_of

    if (run_name is None) != every:
        raise click.UsageError("name a RUN, or give --all")
    place = runs_of(_store(store_url, job_path))
    runs = [_run(run_name, store_url, job_path)] if run_name else [Run(place.at(name)) for name in place.folders()]
    found = remains(runs)
    for one in found:
        click.echo(str(one))
    if not found:
        click.echo("nothing is left of " + (f"run {run_name}" if run_name else f"the runs in {place.url}"))
        return
    if not yes:
        click.confirm("Remove it? Run directories stay.", abort=True)
    take_down(found, click.echo)


@cli.command()
@click.argument("run_name", metavar="RUN")
@click.option("--to", "to_url", metavar="URL", required=True, help="An empty folder.")
@click.option("--step", metavar="STEP", default="last", help="best, last or a number.")
@_store_options
def merge(run_name: str, to_url: str, step: str, store_url: str | None, job_path: str | None) -> None:
    """Write what a run has learnt as weights in upstream's format."""
    found = _run(run_name, store_url, job_path)
    raise click.exceptions.Exit(_trainer("trainer.merge", found.url, to_url, "--step", step))


@cli.command()
@click.argument("run_name", metavar="RUN")
@click.option("--to", "to_url", metavar="URL", required=True, help="An empty folder.")
@click.option("--step", metavar="STEP", default="last", help="best, last or a number.")
@_store_options
def export(run_name: str, to_url: str, step: str, store_url: str | None, job_path: str | None) -> None:
    """Write a run's adapter in upstream's adapter format (fish_speech, ace_step)."""
    found = _run(run_name, store_url, job_path)
    raise click.exceptions.Exit(_trainer("trainer.merge", found.url, to_url, "--step", step, "--adapter"))


@cli.command()
@click.argument("job_paths", metavar="JOB…", nargs=-1, required=True)
@_json
def rehearse(job_paths: tuple[str, ...], as_json: bool) -> None:
    """Run jobs shrunk on this machine: tiny random weights, two workers, a killed rank, audio."""
    from launcher import show
    from launcher.rehearse import rehearse as rehearse_jobs
    from trainer.spec import load_job

    jobs = [load_job(path, to_run=False) for path in job_paths]
    if as_json:
        show.as_json([one.as_json() for one in rehearse_jobs(jobs, partial(click.echo, err=True))])
        return
    with show.following() as say:
        for rehearsal in rehearse_jobs(jobs, say):
            show.rehearsal(rehearsal, say)


@cli.command()
@click.argument("run_name", metavar="RUN")
@_store_options
def sync(run_name: str, store_url: str | None, job_path: str | None) -> None:
    """Tell MLflow what it missed of a run while it was out of reach."""
    if code := _trainer("trainer.tracking", _run(run_name, store_url, job_path).url):
        raise click.exceptions.Exit(code)
    click.echo(f"MLflow has all of run {run_name}")


@cli.command()
@click.option("-o", "--output", metavar="FILE", help="Write it here instead of printing it.")
def schema(output: str | None) -> None:
    """JSON Schema of a job file, for editors."""
    import json

    from trainer.spec import job_schema

    text = json.dumps(job_schema(), ensure_ascii=False, indent=1) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None


@cli.command("demo-data")
@click.argument("folder", metavar="DIR")
def demo_data(folder: str) -> None:
    """A dozen songs in two styles, made here, to try things with."""
    raise click.exceptions.Exit(_trainer("trainer.data.demo", folder))


@cli.command()
@click.option("--model", "weights_url", metavar="URL", help="Test these weights instead; --job tells what they do not.")
@click.option("--dataset", "dataset_url", metavar="URL", help="Prepared songs to test --model on, else made-up ones.")
@_store_options
@_json
def doctor(
    weights_url: str | None, dataset_url: str | None, store_url: str | None, job_path: str | None, as_json: bool
) -> None:
    """What is missing on this machine, and the cure; with --model, whether weights and songs are right."""
    if dataset_url and not weights_url:
        raise click.UsageError("--dataset goes with --model")
    if weights_url:
        given = {"--dataset": dataset_url, "--job": job_path}
        flags = [part for flag, value in given.items() if value for part in (flag, value)]
        raise click.exceptions.Exit(_trainer("trainer.selftest", weights_url, *flags, *["--json"] * as_json))
    from dataclasses import asdict

    from launcher import show
    from launcher.doctor import examine

    job = _load(job_path)
    found = list(examine(store_url or (job.store if job else _default_store()), job))
    if as_json:
        show.as_json([asdict(check) for check in found])
    else:
        show.checks(found)
    raise click.exceptions.Exit(0 if all(check.ok for check in found) else 1)


def _show_manifests(job: "Job", planned: "Plan", run_name: str) -> None:
    from launcher import show
    from launcher.backends import open_backend
    from launcher.runs import runs_of

    with open_backend(job, planned, {}) as backend:
        show.manifests(planned, backend.manifests(runs_of(job.store).at(run_name).url, 1))


def _load(job_path: str | None) -> "Job | None":
    if job_path is None:
        return None
    from trainer.spec import load_job

    return load_job(job_path)


def _default_store() -> str:
    from trainer.store import open_store

    return open_store(os.environ.get("UTAFORGE_STORE") or DEFAULT_STORE).url


def _store(store_url: str | None, job_path: str | None) -> str:
    if store_url:
        return store_url
    job = _load(job_path)
    return job.store if job else _default_store()


def _run(name: str, store_url: str | None, job_path: str | None) -> "Run":
    from launcher.runs import find_run

    return find_run(_store(store_url, job_path), name)


def _trainer(module: str, *arguments: str) -> int:
    """Run a module of the trainer, which may import torch, in a process of its own; returns its exit code."""
    from launcher.submit import environment

    variables = {**os.environ, **environment(1)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=variables, check=False).returncode


def _tell_dataset(job: "Job", as_json: bool) -> None:
    """What the newest version of the first dataset holds (``trainer.data.dataset`` writes these manifests)."""
    import json

    from launcher import show
    from trainer.store import open_store

    url = job.data.train[0].dataset
    store = open_store(url)
    newest = max(entry.path for entry in store.list("versions"))
    manifest: dict[str, Any] = json.loads(store.get(newest))
    kept = {key: manifest[key] for key in ("songs", "seconds", "digest", "failures")}
    told: dict[str, Any] = {"dataset": url, "version": int(Path(newest).stem), **kept}
    if as_json:
        show.as_json(told)
        return
    click.echo(f"{url}: version {told['version']}, {told['songs']} songs, {told['seconds'] / 60:.1f} minutes")
    for failure in told["failures"]:
        click.echo(f"  left out {failure['name']}: {failure['reason']}")


def _unexpected(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  (for what Python flushes at its end)
        return 0
    if os.environ.get("UTAFORGE_DEBUG"):
        traceback.print_exception(error)
        return 1
    place = Path(tempfile.gettempdir(), f"utaforge-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt")
    place.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    _complain(f"this is a fault of utaforge itself: {type(error).__name__}: {error}\n  → report it with {place}")
    return 1


def _complain(text: str) -> None:
    click.echo(f"utaforge: {text}", err=True)


if __name__ == "__main__":
    main()

"""Songs from a run: ``python -m trainer.validation.generate RUN_URL --tags "童謡" --seconds 10 --output songs``."""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from trainer.adapt import apply, load_adapter
from trainer.checkpoint import Checkpoints
from trainer.codecs import open_codec
from trainer.engine import load_sharded
from trainer.families import open_family
from trainer.families.base import Family
from trainer.rundir import RunDirectory
from trainer.spec.errors import JobError, StoreError, UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.spec.job import Prompt, Sampling, ValidationSpec
from trainer.spec.model import Lora

from .render import Rendered, render

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOGETHER = 4
"""Songs between two lines of progress."""


def main(argv: list[str] | None = None) -> int:
    """See ``--help``; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr if args.json else sys.stdout)
    try:
        told = generate(RunDirectory(args.run), args)
    except UtaforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if args.json:
        sys.stdout.write(json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    return 0


def generate(run: RunDirectory, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Render what the command line asks for into ``args.output``; returns the songs' files, prompts and measures.

    Raises:
        UtaforgeError: the run has no such checkpoint, a prompt is wrong, or the folder cannot be written.
    """
    prompts = [
        prompt.model_copy(update={"seed": prompt.seed + sample})
        for prompt in wanted(run, args)
        for sample in range(args.n_samples)
    ]
    sampling = sampled(run, args)
    device = _device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    family, network = load(run, args.step)
    network.to(device=device, dtype=dtype).eval()
    codec = open_codec(run.job.model)
    told: list[dict[str, Any]] = []
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(prompts), TOGETHER):
            some = tuple(prompts[start : start + TOGETHER])
            begun = time.perf_counter()
            songs = render(network, family, codec, ValidationSpec(prompts=some, sampling=sampling, format=args.format))
            told += [_write(args.output, start, song) for song in songs]
            _progress(start + len(some), len(prompts), songs, time.perf_counter() - begun)
    except OSError as error:
        raise StoreError(
            f"cannot write {args.output}: {error.strerror}", "choose another folder with --output"
        ) from error
    return told


def load(run: RunDirectory, step: str) -> tuple[Family, nn.Module]:
    """The run's family and network, on the CPU in fp32, with the weights of a step.

    Args:
        run: the run.
        step: ``last`` (the finished result, else the newest checkpoint), ``best``, a number, or ``base``: untrained.

    Raises:
        StoreError: there is no such checkpoint.
    """
    model, method = run.job.model, run.job.method
    family = open_family(model)
    network = family.network()
    if step == "base":
        return family, network
    with tempfile.TemporaryDirectory(prefix="utaforge-generate-") as scratch:
        folder = Path(scratch)
        if isinstance(method, Lora):
            fetch(run, step, folder, finished="adapter")
            network = apply(network, method.model_copy(update={"init": None}), FAMILIES[model.family])
            load_adapter(network, folder)
        else:
            fetch(run, step, folder)
            tensors = load_sharded(folder).tensors
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if parameter.requires_grad:  # what the family freezes was not trained, and is not in a checkpoint
                        parameter.copy_(tensors[name]["param"])
        return family, network


def fetch(run: RunDirectory, step: str, into: Path, finished: str | None = None) -> None:
    """Copy the files of a checkpoint; for the last one, those of the run's folder ``finished`` if it is there.

    Raises:
        StoreError: there is no such checkpoint.
    """
    if finished and step == "last" and run.store.at(finished).manifest():
        run.store.at(finished).fetch(into)
        return
    checkpoints = Checkpoints(run.store.at("checkpoints"), run.job.checkpoint.keep)
    commits = list(checkpoints.commits())
    there = ", ".join(str(commit.step) for commit in commits) or "none"
    if step == "last":
        commit = commits[0] if commits else None
    elif step == "best":
        commit = checkpoints.best()
    else:
        commit = next((commit for commit in commits if str(commit.step) == step), None)
    if commit is None:
        raise StoreError(
            f"{run.url} has no checkpoint {step!r}", f"its steps: {there}; --step base is the untrained model"
        )
    log.info("weights of step %d", commit.step)
    checkpoints.restore(commit, into)


def wanted(run: RunDirectory, args: argparse.Namespace) -> Sequence[Prompt]:
    """The prompts of ``--input-jsonl``, else of ``--tags`` and ``--lyrics``, else of the job.

    Raises:
        JobError: a line or a field is wrong, or there are no prompts at all.
    """
    fields = FAMILIES[run.job.model.family].prompt_fields
    common = {name: getattr(args, name) for name in ("seconds", "seed") if getattr(args, name) is not None}
    if args.input_jsonl:
        return [_prompt(common | entry, fields, where) for where, entry in _lines(args.input_jsonl)]
    texts = {name: getattr(args, name) for name in ("tags", "lyrics") if getattr(args, name) is not None}
    if texts:
        return [_prompt(common | texts, fields, "the command line")]
    if not run.job.validation.prompts:
        raise JobError("the job has no validation.prompts to render", "say what to render: --tags, --lyrics")
    return [prompt.model_copy(update=common) for prompt in run.job.validation.prompts]


def sampled(run: RunDirectory, args: argparse.Namespace) -> Sampling:
    """The job's sampling, but for what the command line says.

    Raises:
        JobError: a value cannot be, or the family does not listen to it.
    """
    asked = {name: value for name in Sampling.model_fields if (value := getattr(args, name)) is not None}
    used = FAMILIES[run.job.model.family].sampling
    if useless := sorted(asked.keys() - used.keys()):
        raise JobError(f"the command line: this family does not use {', '.join(useless)}", f"it uses {', '.join(used)}")
    try:
        return Sampling(**run.job.validation.sampling.given | asked)
    except ValidationError as error:
        raise JobError(f"the sampling is wrong: {_faults(error)}", "see --help") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.validation.generate", description=__doc__)
    parser.add_argument("run", help="URL of the run directory")
    parser.add_argument("--tags", help="what it should sound like; without texts, the job's prompts are rendered")
    parser.add_argument("--lyrics", help="what is sung")
    parser.add_argument("--input-jsonl", type=Path, metavar="FILE", help="a prompt a line: tags, lyrics, seconds, seed")
    parser.add_argument("--seconds", type=float, help="length")
    parser.add_argument("--seed", type=int, help="the same seed gives the same song")
    parser.add_argument("--n-samples", type=_count, default=1, metavar="N", help="songs a prompt, of seeds that follow")
    parser.add_argument("--format", choices=("wav", "flac", "mp3"), default="flac")
    parser.add_argument("--output", type=Path, default=Path("songs"), metavar="DIR", help="folder for the songs")
    sampling = parser.add_argument_group("sampling", "by default as in the job; each family uses some of these")
    sampling.add_argument("--guidance", type=float, help="how closely the prompt is followed; 1: no guidance")
    sampling.add_argument("--temperature", type=float, help="of the tokens")
    sampling.add_argument("--top-k", type=int, help="likeliest tokens that are chosen from; 0: no limit")
    sampling.add_argument("--top-p", type=float, help="their probability in all")
    sampling.add_argument("--repetition-penalty", type=float, help="of tokens that were just there; 1: none")
    sampling.add_argument("--sampler", help="euler, heun or pingpong")
    sampling.add_argument("--sampling-steps", dest="steps", type=int, help="from noise to latents")
    sampling.add_argument("--flow-temperature", type=float, help="where the flow is given noise; 1: from the start")
    parser.add_argument("--step", default="last", help="last, best, a step's number, or base (untrained)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--json", action="store_true", help="tell the songs as JSON on standard output")
    return parser


def _device(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in there:
        raise JobError(f"there is no device {name!r} here", f"write one of {', '.join(there)}")
    return torch.device(name)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file} cannot be read: {error}", "name a UTF-8 file with one JSON object a line") from None
    entries: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise JobError(f"{file}:{number}: not JSON: {error}", "write one JSON object a line") from None
        if not isinstance(entry, dict):
            raise JobError(f"{file}:{number}: not a JSON object", 'write {"tags": …, "seconds": …}')
        entries.append((f"{file}:{number}", entry))
    if not entries:
        raise JobError(f"{file} holds no prompts", "write one JSON object a line")
    return entries


def _prompt(fields: dict[str, Any], usable: Sequence[str], where: str) -> Prompt:
    try:
        prompt = Prompt.model_validate(fields)
    except ValidationError as error:
        raise JobError(f"{where}: {_faults(error)}", f"a prompt has {', '.join(usable)}, seconds and seed") from None
    useless = sorted(set(fields) - set(usable) - {"seconds", "seed"})
    if useless:
        raise JobError(f"{where}: this family does not use {', '.join(useless)}", f"it uses {', '.join(usable)}")
    return prompt


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _write(folder: Path, offset: int, song: Rendered) -> dict[str, Any]:
    number = offset + song.index
    path = folder / f"song-{number:02d}-seed-{song.prompt.seed}{Path(song.name).suffix}"
    path.write_bytes(song.audio)
    measures = ", ".join(f"{name} {value:.3g}" for name, value in song.measures.items())
    log.info("%s: %s", path, measures)
    return {"file": str(path), "prompt": song.prompt.model_dump(), "measures": dict(song.measures)}


def _progress(done: int, total: int, songs: Sequence[Rendered], seconds: float) -> None:
    rate = sum(song.measures["seconds"] for song in songs) / seconds
    log.info("%d/%d songs, %.1f s of sound a second", done, total, rate)


if __name__ == "__main__":
    sys.exit(main())

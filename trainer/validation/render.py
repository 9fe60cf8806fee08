"""Validation audio: prompts → songs with the current weights, measured, encoded and put into the run directory."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from trainer.audio.measures import measure
from trainer.audio.write import Format, encode
from trainer.checkpoint import folder_of
from trainer.codecs import Codec
from trainer.families.base import Arrays, Family
from trainer.spec.errors import StoreError
from trainer.spec.job import Prompt, Sampling, ValidationSpec
from trainer.store import Store

log = logging.getLogger(__name__)
TOGETHER = 8
"""Prompts in one batch; keeps the memory of a long list bounded."""


@dataclass(frozen=True)
class Rendered:
    """One prompt's song.

    Attributes:
        index: of the prompt in the job.
        prompt: what was asked for.
        name: file name, ``prompt-00.flac``.
        audio: the file.
        measures: see ``trainer.audio.measures``.
    """

    index: int
    prompt: Prompt
    name: str
    audio: bytes
    measures: Mapping[str, float]


class Stored(NamedTuple):
    """What ``store_audio`` has put into the run directory, the same on all ranks.

    Attributes:
        paths: of the songs and of ``measures.json``, relative to the run directory.
        metrics: ``audio/prompt-00/silence_ratio`` → value, for the journal.
    """

    paths: list[str]
    metrics: dict[str, float]


def render(
    network: nn.Module,
    family: Family,
    codec: Codec,
    validation: ValidationSpec,
    *,
    rank: int = 0,
    world: int = 1,
    lockstep: bool = False,
) -> list[Rendered]:
    """The songs of this rank's share of the prompts; prompt ``i`` belongs to rank ``i % world``.

    Each song follows from its prompt and the weights alone, not from the world size. A GPU without the memory for a
    batch tries its songs one by one and gives up, with a warning, those that do not fit even so; everything else that
    is raised is our own bug or a fault in the job.

    Args:
        network: in eval mode, as ``Engine.generating`` gives it.
        family: generates.
        codec: makes them audible.
        validation: prompts, sampling and file format.
        rank: of this process.
        world: number of ranks.
        lockstep: the network's parameters are sharded, so that all ranks must generate all songs together. There is no
            second try then, since the others would not know of it.
    """
    prompts = list(enumerate(validation.prompts))
    if not lockstep:
        prompts = prompts[rank::world]
    songs: list[Rendered] = []
    for start in range(0, len(prompts), TOGETHER):
        batch = prompts[start : start + TOGETHER]
        wanted = [prompt for _, prompt in batch]
        sampling = validation.sampling
        made = family.generate(network, wanted, sampling) if lockstep else _generate(network, family, wanted, sampling)
        for (index, prompt), arrays in zip(batch, made, strict=True):
            if arrays is not None and index % world == rank:
                songs.append(_finish(index, prompt, arrays, codec, validation.format))
    return songs


def store_audio(store: Store, step: int, songs: Sequence[Rendered]) -> Stored:
    """Put songs into ``audio/step-00000050/`` of the run directory; rank 0 adds ``measures.json`` about all of them.

    A collective: every rank calls it, also without songs. A store that refuses costs the song, with a warning, never
    the run.
    """
    folder = f"audio/{folder_of(step)}"
    kept = [_record(song) for song in songs if _put(store, f"{folder}/{song.name}", song.audio)]
    records = sorted(_gather(kept), key=lambda record: record["file"])
    paths = [f"{folder}/{record['file']}" for record in records]
    measures = f"{folder}/measures.json"
    told = json.dumps({"step": step, "songs": records}, ensure_ascii=False, indent=1).encode()
    if not dist.is_initialized() or dist.get_rank() == 0:
        _put(store, measures, told)
    metrics = {
        f"audio/{record['file'].partition('.')[0]}/{name}": value
        for record in records
        for name, value in record["measures"].items()
    }
    return Stored([*paths, measures], metrics)


def _generate(network: nn.Module, family: Family, prompts: Sequence[Prompt], sampling: Sampling) -> list[Arrays | None]:
    """What each prompt gave, together or one by one as memory allows; None where it does not."""
    try:
        return list(family.generate(network, prompts, sampling))
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            problem = str(error).partition(".")[0]
            log.warning("no memory to render a song of %g s, it is left out: %s", prompts[0].seconds, problem)
            return [None]
    torch.cuda.empty_cache()
    return [arrays for prompt in prompts for arrays in _generate(network, family, [prompt], sampling)]


def _finish(index: int, prompt: Prompt, arrays: Arrays, codec: Codec, format: Format) -> Rendered:
    audio = codec.decode(arrays)
    measures = measure(audio, codec.sample_rate, prompt.seconds)
    return Rendered(index, prompt, f"prompt-{index:02d}.{format}", encode(audio, codec.sample_rate, format), measures)


def _record(song: Rendered) -> dict[str, Any]:
    return {"file": song.name, **song.prompt.model_dump(), "measures": dict(song.measures)}


def _put(store: Store, path: str, content: bytes) -> bool:
    try:
        store.put(path, content)
    except StoreError as error:
        log.warning("%s is lost: %s", path, error.problem)
        return False
    return True


def _gather(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All ranks' records, on every rank; as JSON, since torch's own gathering of objects pickles."""
    if not dist.is_initialized():
        return records
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    mine = torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    lengths = [int(size) for size in sizes]
    padded = [torch.zeros(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(padded, nn.functional.pad(mine, (0, max(lengths) - len(mine))))
    pairs = zip(padded, lengths, strict=True)
    return [record for text, length in pairs for record in json.loads(bytes(text[:length].tolist()))]

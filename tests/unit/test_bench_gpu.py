"""``make bench-gpu`` on a CPU: tiny networks, and only the packages that a bare GPU box has."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import TypeAdapter

from tests.bench.gpu import PACKAGES, _grouped, _songs, _weights_times_positions, on_cpu, peak_of
from trainer.families import open_family
from trainer.families.musicgen.network import MusicGenNetwork
from trainer.spec.families import FAMILIES, Model

ROOT = Path(__file__).parents[2]


def _brought_along(package: str, seen: set[str]) -> set[str]:
    """``seen``, the package, and what is installed of what it requires, without extras."""
    name = canonicalize_name(package)
    if name in seen:
        return seen
    try:
        requirements = [Requirement(line) for line in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for one in requirements:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            _brought_along(one.name, seen)
    return seen


THERE = set[str]().union(*(_brought_along(package, set()) for package in PACKAGES))
ABSENT = {
    module
    for module, packages in metadata.packages_distributions().items()
    if not THERE & {canonicalize_name(package) for package in packages}
} - {"trainer"}
ON_A_BARE_BOX = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""
MUSICGEN = open_family(TypeAdapter(Model).validate_python({"family": "musicgen", "pretrained": "random:tiny"}))


def test_all_families_are_measured_with_the_packages_of_a_bare_gpu_box() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "250", "PYTHONPATH": str(ROOT)}
    assert {"jaxtyping", "diffusers", "pyarrow", "obstore", "ray"} <= ABSENT
    command = [sys.executable, "-c", ON_A_BARE_BOX]
    results = sorted((ROOT / "tests" / "bench" / "results").iterdir())
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "gpu " in line]
    assert [row[0] for row in rows] == [f"gpu {name}" for name in FAMILIES]
    for _, ours, plain, value, limit, mark in rows:
        assert "tokens/s, MFU unknown, memory unknown; N " in ours
        assert "tokens/s, MFU unknown, memory unknown: we are " in plain
        assert (value, limit, mark) == ("unknown", "", "")
    assert sorted((ROOT / "tests" / "bench" / "results").iterdir()) == results


def test_n_times_d_is_each_weight_times_the_positions_that_pass_it() -> None:
    songs = _songs(MUSICGEN, on_cpu())[:1]
    network = MUSICGEN.network()
    assert isinstance(network, MusicGenNetwork)
    frames, books = songs[0].arrays["codes"].shape[-1], MUSICGEN.codebooks
    words = len(songs[0].arrays["text_hidden"])
    assert words > 1
    wanted = 0
    for name, weight in network.named_parameters():
        if "embed_tokens" in name or weight.ndim < 2:
            continue
        of_text = "enc_to_dec_proj" in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        positions = words if of_text else frames if "lm_heads" in name else frames + books - 1
        wanted += weight.numel() * positions
    assert _weights_times_positions(MUSICGEN, songs, on_cpu()) == wanted


def test_every_song_is_in_one_micro_batch_beside_songs_of_its_length() -> None:
    songs = _songs(MUSICGEN, on_cpu())
    micro = _grouped(songs, 2)
    assert sorted(song.id for batch in micro for song in batch) == [f"歌{index}" for index in range(len(songs))]
    lengths = [song.arrays["codes"].shape[-1] for batch in micro for song in batch]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", 65e12), ("NVIDIA T400 4GB", None)],
)
def test_the_peak_follows_from_the_name_of_the_gpu(gpu: str, peak: float | None) -> None:
    assert peak_of(gpu) == peak

"""Validation audio of a tiny network with random weights."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from trainer.codecs import open_codec
from trainer.families import open_family
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.families import FAMILIES
from trainer.spec.job import Job, Prompt, Sampling, ValidationSpec
from trainer.store import open_store
from trainer.validation.render import render, store_audio

MODEL = MusicGen(family="musicgen", pretrained="random:tiny")
SAMPLING = Sampling(**FAMILIES["musicgen"].sampling)
PROMPTS = tuple(Prompt(tags=f"童謡 さくら {n}", seconds=0.2 + 0.1 * n, seed=n) for n in range(3))


@pytest.fixture(scope="module")
def tools():
    family = open_family(MODEL)
    return family.network().eval(), family, open_codec(MODEL)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_every_prompt_becomes_a_file_of_the_length_asked_for(tools, format):
    songs = render(*tools, ValidationSpec(prompts=PROMPTS[:1], sampling=SAMPLING, format=format))
    assert [song.name for song in songs] == [f"prompt-00.{format}"]
    audio, rate = soundfile.read(io.BytesIO(songs[0].audio))
    assert rate == tools[2].sample_rate
    assert songs[0].measures["duration_reached"] == pytest.approx(1.0, abs=0.11)
    assert len(audio) / rate == pytest.approx(0.2, abs=0.15)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_given_upstreams_sampling_where_the_job_says_nothing(name, tools):
    class Told(Exception):
        pass

    class Listening:
        def generate(self, network, prompts, sampling):
            raise Told(sampling.given)

    job = Job.model_validate(
        {
            "name": "uta",
            "store": "s3://歌",
            "model": {"family": name, "pretrained": "random:tiny"},
            "method": {"type": "lora"},
            "data": {"train": [{"dataset": "s3://歌/songs"}]},
            "train": {"steps": 1, "batch": {"songs": 1}},
            "validation": {"prompts": [{}]},
        }
    )
    with pytest.raises(Told) as told:
        render(tools[0], Listening(), tools[2], job.validation)
    assert told.value.args == (FAMILIES[name].sampling,)


@pytest.mark.parametrize("lockstep", [False, True])
def test_two_ranks_render_what_one_rank_renders(tools, lockstep):
    spec = ValidationSpec(prompts=PROMPTS, sampling=SAMPLING)
    alone = {song.name: song.audio for song in render(*tools, spec)}
    shares = [render(*tools, spec, rank=rank, world=2, lockstep=lockstep) for rank in range(2)]
    assert [[song.index for song in share] for share in shares] == [[0, 2], [1]]
    assert {song.name: song.audio for share in shares for song in share} == alone


def test_songs_that_do_not_fit_together_are_rendered_one_by_one(tools, caplog):
    network, family, codec = tools

    class SmallMachine:
        def generate(self, network, prompts, sampling):
            if sum(prompt.seconds for prompt in prompts) > 0.35:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return family.generate(network, prompts, sampling)

    songs = render(network, SmallMachine(), codec, ValidationSpec(prompts=PROMPTS, sampling=SAMPLING))
    assert [song.index for song in songs] == [0, 1]
    assert "no memory to render a song of 0.4 s" in caplog.text


def test_songs_and_measures_are_in_the_run_directory(tools, tmp_path):
    store = open_store(f"file://{tmp_path}/runs/歌")
    stored = store_audio(store, 50, render(*tools, ValidationSpec(prompts=PROMPTS[:2], sampling=SAMPLING)))
    assert stored.paths == [
        "audio/step-00000050/prompt-00.flac",
        "audio/step-00000050/prompt-01.flac",
        "audio/step-00000050/measures.json",
    ]
    told = json.loads(store.get(stored.paths[-1]))
    assert [song["tags"] for song in told["songs"]] == ["童謡 さくら 0", "童謡 さくら 1"]
    assert stored.metrics["audio/prompt-01/silence_ratio"] == told["songs"][1]["measures"]["silence_ratio"]
    assert all(np.isfinite(value) for value in stored.metrics.values())


def test_a_store_that_refuses_costs_the_songs_but_not_the_run(tools, tmp_path, caplog):
    (tmp_path / "runs").write_text("a file where a folder should be")
    songs = render(*tools, ValidationSpec(prompts=PROMPTS[:1], sampling=SAMPLING))
    stored = store_audio(open_store(f"file://{tmp_path}/runs/x"), 50, songs)
    assert stored.metrics == {}
    assert "prompt-00.flac is lost" in caplog.text


RANK = """
import sys
import torch.distributed as dist
from trainer.spec.job import Prompt
from trainer.store import open_store
from trainer.validation.render import Rendered, store_audio

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
song = Rendered(rank, Prompt(tags="さくら" * (rank + 1)), f"prompt-{rank:02d}.wav", b"RIFF", {"seconds": float(rank)})
stored = store_audio(open_store(f"file://{folder}/run"), 7, [song])
assert stored.metrics == {"audio/prompt-00/seconds": 0.0, "audio/prompt-01/seconds": 1.0}, stored
dist.destroy_process_group()
"""


def test_rank_0_tells_of_all_ranks_songs(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    told = json.loads((tmp_path / "run/audio/step-00000007/measures.json").read_text())
    assert [song["tags"] for song in told["songs"]] == ["さくら", "さくらさくら"]
    assert (tmp_path / "run/audio/step-00000007/prompt-01.wav").read_bytes() == b"RIFF"

"""Songs from a run directory, by the command that the launcher calls."""

import json
from pathlib import Path

import pytest
import soundfile
import torch

from trainer.adapt import apply, save_adapter
from trainer.families import open_family
from trainer.rundir import RunDirectory
from trainer.spec import Job, dump_job
from trainer.spec.families import FAMILIES
from trainer.store import open_store
from trainer.validation.generate import _parser, main, sampled


def job(**method):
    return Job.model_validate(
        {
            "name": "sakura",
            "store": "file:///somewhere",
            "model": {"family": "musicgen", "pretrained": "random:tiny"},
            "method": method or {"type": "lora", "rank": 2},
            "data": {"train": [{"dataset": "file:///songs"}]},
            "train": {"steps": 40, "batch": {"songs": 2}},
            "validation": {
                "sampling": {"guidance": 2},
                "prompts": [{"tags": "童謡 さくら", "seconds": 0.2, "seed": 3}],
            },
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with commits at 10 (the better) and 20, whose adapters make very different noise."""
    folder = tmp_path_factory.mktemp("run")
    store = open_store(f"file://{folder}/runs/歌")
    store.put("job.json", dump_job(job()).encode())
    for step, loss in ((10, 1.0), (20, 2.0)):
        network = apply(open_family(job().model).network(), job().method, FAMILIES["musicgen"])
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=step / 10, generator=torch.Generator().manual_seed(step))
        save_adapter(network, folder / str(step))
        files = {path.name: path for path in (folder / str(step)).iterdir()}
        store.at(f"checkpoints/step-{step:08d}").publish(files, step=step, meta={"validation_loss": loss})
    return store


def songs(run, capsys, tmp_path, *flags):
    assert main([run.url, "--json", "--output", str(tmp_path / "songs"), "--device", "cpu", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def refused(run, capsys, *flags):
    status = main([run.url, "--output", "/proc/nowhere", *flags])
    return status, capsys.readouterr().err


def test_the_jobs_prompts_are_rendered_with_the_newest_weights(run, capsys, tmp_path):
    (song,) = songs(run, capsys, tmp_path)
    assert song["prompt"]["tags"] == "童謡 さくら"
    assert Path(song["file"]).name == "song-00-seed-3.flac"
    assert soundfile.info(song["file"]).duration == pytest.approx(0.2, abs=0.05)
    (same,) = songs(run, capsys, tmp_path / "again", "--step", "20")
    assert Path(same["file"]).read_bytes() == Path(song["file"]).read_bytes()


def test_each_step_has_its_own_weights(run, capsys, tmp_path):
    heard = {
        step: Path(songs(run, capsys, tmp_path / step, "--step", step)[0]["file"]).read_bytes()
        for step in ("base", "10", "best", "last")
    }
    assert heard["best"] == heard["10"]
    assert len(set(heard.values())) == 3


def test_texts_seeds_and_formats_come_from_the_command_line(run, capsys, tmp_path):
    flags = ("--tags", "演歌", "--seconds", "0.3", "--seed", "5", "--n-samples", "2", "--format", "wav", "--top-k", "0")
    told = songs(run, capsys, tmp_path, *flags)
    assert [Path(song["file"]).name for song in told] == ["song-00-seed-5.wav", "song-01-seed-6.wav"]
    assert {song["prompt"]["tags"] for song in told} == {"演歌"}
    assert told[0]["measures"]["seconds"] == pytest.approx(0.3, abs=0.05)


def test_sampling_is_the_jobs_but_for_what_the_command_line_says(run):
    def sampling(*flags):
        return sampled(RunDirectory(run.url), _parser().parse_args([run.url, *flags])).given

    assert sampling() == {"guidance": 2.0, "temperature": 1.0, "top_k": 250}, "the job's guidance, upstream's others"
    assert sampling("--top-k", "0", "--guidance", "1") == {"guidance": 1.0, "temperature": 1.0, "top_k": 0}


def test_prompts_may_come_from_a_file(run, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"tags": "民謡", "seconds": 0.2}\n\n{"tags": "演歌", "seed": 9}\n', encoding="utf-8")
    told = songs(run, capsys, tmp_path, "--input-jsonl", str(file), "--seconds", "0.1", "--dtype", "bf16")
    assert [(song["prompt"]["tags"], song["prompt"]["seconds"]) for song in told] == [("民謡", 0.2), ("演歌", 0.1)]


def test_a_finished_run_speaks_with_its_final_adapter(run, capsys, tmp_path):
    files = {
        entry.path: run.get(f"checkpoints/step-00000010/{entry.path}")
        for entry in run.at("checkpoints/step-00000010").list()
    }
    del files["manifest.json"]
    run.at("adapter").publish(files)
    last = Path(songs(run, capsys, tmp_path)[0]["file"]).read_bytes()
    run.delete([f"adapter/{name}" for name in ("manifest.json", *files)])
    assert last == Path(songs(run, capsys, tmp_path / "10", "--step", "10")[0]["file"]).read_bytes()


def test_what_cannot_be_rendered_is_said_plainly(run, capsys, tmp_path):
    status, error = refused(run, capsys, "--step", "15")
    assert (status, "has no checkpoint '15'" in error, "its steps: 20, 10" in error) == (3, True, True)
    status, error = refused(run, capsys, "--lyrics", "さくら")
    assert (status, "this family does not use lyrics" in error) == (2, True)
    status, error = refused(run, capsys, "--seconds", "-1", "--tags", "演歌")
    assert (status, "the command line: seconds: Input should be greater than 0" in error) == (2, True)
    status, error = refused(run, capsys, "--temperature", "0")
    assert (status, "the sampling is wrong: temperature" in error) == (2, True)
    status, error = refused(run, capsys, "--sampling-steps", "9")
    assert (status, "this family does not use steps" in error) == (2, True)
    assert "it uses guidance, temperature, top_k" in error
    status, error = refused(run, capsys, "--device", "cuda:99")
    assert (status, "there is no device 'cuda:99' here" in error) == (2, True)
    (tmp_path / "bad.jsonl").write_text('{"tags": "演歌"}\n{"tags": \n', encoding="utf-8")
    status, error = refused(run, capsys, "--input-jsonl", str(tmp_path / "bad.jsonl"))
    assert (status, "bad.jsonl:2: not JSON" in error) == (2, True)


def test_a_run_that_does_not_exist_is_a_store_error(capsys, tmp_path):
    assert main([f"file://{tmp_path}/runs/none"]) == 3
    assert "job.json does not exist" in capsys.readouterr().err

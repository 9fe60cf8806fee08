"""The gate, on made-up records of runs."""

import json
from pathlib import Path

import pytest

from trainer.champion import champion_of
from trainer.gate import RETRAIN, choose, judge, main, settle
from trainer.rundir import RunDirectory
from trainer.spec import Job, JobError, dump_job
from trainer.store import open_store

SOUND = {"silence_ratio": 0.1, "clipping_ratio": 0.0, "duration_reached": 1.0}
LYRICS = "[verse] さくら さくら\n[chorus] やよいの空は"


def songs(**measures: float) -> dict[str, dict]:
    """One song, sound but for ``measures``."""
    prompt = {"tags": "童謡 | 子守唄", "lyrics": LYRICS, "seconds": 8.0, "seed": 1}
    return {"prompt-00.flac": {"file": "prompt-00.flac", **prompt, "measures": {**SOUND, **measures}}}


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/歌"


def a_run(store: str, name: str, champion: int = 0, losses=(5.0, 4.5), after: dict | None = None) -> RunDirectory:
    """A finished retraining that began from the champion of that number."""
    job = Job.model_validate(
        {
            "name": "sakura",
            "store": store,
            "model": {"family": "musicgen", "pretrained": "random:tiny"},
            "method": {"type": "lora"},
            "data": {"train": [{"dataset": "file:///songs"}], "validation": {"dataset": "file:///held-out"}},
            "train": {"steps": 40, "batch": {"songs": 2}},
            "validation": {"prompts": [{"tags": "童謡"}]},
            "retrain": {"cron": "0 3 * * 0"},
        }
    )
    at = open_store(f"{store}/runs/{name}")
    pin = {"version": 1, "digest": "d" * 64}
    records = {
        "data.json": {"train": [{"url": "file:///songs", **pin}], "validation": {"url": "file:///held-out", **pin}},
        "result.json": {"loss_before": losses[0], "loss_after": losses[1], "adapter": "adapter"},
        RETRAIN: {"champion": champion, "by": None},
        "audio/step-00000000/measures.json": {"songs": list(songs().values())},
        "audio/step-00000040/measures.json": {"songs": list((songs() if after is None else after).values())},
    }
    at.put("job.json", dump_job(job).encode())
    for path, content in records.items():
        at.put(path, json.dumps(content).encode())
    return RunDirectory(at.url)


def champion(run: RunDirectory) -> str | None:
    now = champion_of(run.job)
    return now.run if now else None


@pytest.mark.parametrize(
    ("losses", "after", "reason"),
    [
        ((5.0, 5.0), songs(), "held-out loss did not fall: 5.0000 → 5.0000"),
        ((5.0, float("nan")), songs(), "held-out loss did not fall: 5.0000 → nan"),
        ((5.0, 4.0), songs(silence_ratio=0.31), "prompt-00.flac has fallen silent: silent 10.0% → 31.0%"),
        ((5.0, 4.0), songs(clipping_ratio=0.02), "prompt-00.flac is clipped: clipped 0.0% → 2.0%"),
        ((5.0, 4.0), songs(duration_reached=0.5), "prompt-00.flac ends too early: length reached 100.0% → 50.0%"),
        ((5.0, 4.0), {}, "prompt-00.flac was not rendered"),
    ],
)
def test_a_candidate_that_loses_anything_is_rejected_with_the_reason(losses, after, reason) -> None:
    verdict = judge(losses, songs(), after)
    assert (verdict.promoted, verdict.reasons) == (False, (reason,))


def test_a_candidate_with_less_loss_passes_also_where_songs_differ_a_little() -> None:
    verdict = judge((5.0, 4.9), songs(), songs(silence_ratio=0.25, clipping_ratio=0.005, duration_reached=0.95))
    assert verdict.promoted


def test_a_song_as_bad_as_the_champions_is_no_reason() -> None:
    assert judge((5.0, 4.9), songs(silence_ratio=1.0), songs(silence_ratio=1.0)).promoted


def test_without_any_song_nothing_can_be_compared() -> None:
    assert not judge((5.0, 4.9), {}, {}).promoted


def test_the_first_to_pass_is_the_champion_and_the_next_better_one_follows_it(store: str) -> None:
    assert settle(a_run(store, "sakura")).promoted
    assert settle(a_run(store, "sakura-2", champion=1)).promoted
    now = champion_of(a_run(store, "sakura-3").job)
    assert now is not None
    assert (now.number, now.run, now.by) == (2, "sakura-2", "gate")
    assert now.adapter == f"{store}/runs/sakura-2/adapter"
    assert now.data["validation"]["url"] == "file:///held-out"


def test_a_rejected_run_leaves_the_champion_and_a_report_that_a_person_can_read(store: str) -> None:
    settle(a_run(store, "sakura"))
    run = a_run(store, "sakura-2", champion=1, losses=(4.5, 4.7), after=songs(duration_reached=0.5))
    assert not settle(run).promoted
    assert champion(run) == "sakura"
    told = json.loads(run.store.get("verdict.json"))
    assert (told["promoted"], len(told["reasons"]), told["champion"]) == (False, 2, "sakura")
    report = run.store.get("report.md").decode()
    assert report.startswith("# sakura-2: rejected\n\nIt started from the champion sakura and had to beat it.\n")
    for line in (
        "- held-out loss did not fall: 4.5000 → 4.7000",
        "Trained on file:///songs version 1; judged on file:///held-out version 1.",
        "> 童謡 | 子守唄",
        "> [chorus] やよいの空は",
        "| length reached | 100.0% | 50.0% |",
        "| listen to | audio/step-00000000/prompt-00.flac | audio/step-00000040/prompt-00.flac |",
    ):
        assert f"\n{line}\n" in report


def test_of_two_that_began_from_the_same_champion_only_the_first_is_promoted(store: str) -> None:
    settle(a_run(store, "sakura"))
    assert settle(a_run(store, "sakura-2", champion=1)).promoted
    late = settle(a_run(store, "sakura-3", champion=1))
    assert not late.promoted
    assert late.reasons == ("sakura-2 became the champion meanwhile, by gate; this run never met it",)


def test_judging_a_promoted_run_again_changes_nothing_even_after_its_successor(store: str) -> None:
    first = a_run(store, "sakura")
    assert settle(first).promoted
    second = a_run(store, "sakura-2", champion=1)
    settle(second)
    assert settle(first).promoted
    assert champion(first) == "sakura-2"


def test_a_person_chooses_an_older_run_again_and_what_beats_that_follows(store: str) -> None:
    first, second = a_run(store, "sakura"), a_run(store, "sakura-2", champion=1)
    settle(first)
    settle(second)
    assert choose(first).number == 3
    assert champion(first) == "sakura"
    assert settle(a_run(store, "sakura-3", champion=3)).promoted


def test_a_run_that_is_champion_or_unfinished_is_not_chosen(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(store, "sakura")
    settle(run)
    with pytest.raises(JobError, match="run sakura is the champion of sakura already"):
        choose(run)
    other = a_run(store, "sakura-2")
    other.store.delete(["result.json"])
    assert main([other.url, "--promote"]) == 2
    assert "run sakura-2 has no adapter to promote: it is not finished" in capsys.readouterr().err

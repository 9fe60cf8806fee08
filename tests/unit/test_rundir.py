import json
import sys
from pathlib import Path

import pytest

from trainer.driver.attempt import _log_kept
from trainer.rundir import RunDirectory
from trainer.spec.errors import DataError, TrainingError


def attempted(folder: Path, number: int) -> RunDirectory:
    """The run as a process of that attempt sees it."""
    path = folder / "uta" / "attempts" / f"{number:04d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return RunDirectory(f"file://{folder}/uta")


def test_a_failure_ends_its_own_attempt_again_with_the_same_code_and_is_forgotten_by_the_next(tmp_path: Path) -> None:
    attempted(tmp_path, 1).report_failure(DataError("歌が壊れている", "直す"))
    with pytest.raises(TrainingError, match="歌が壊れている") as caught:
        attempted(tmp_path, 1).raise_reported_failure()
    assert (caught.value.cure, caught.value.exit_code) == ("直す", DataError.exit_code)
    attempted(tmp_path, 2).raise_reported_failure()
    assert not (tmp_path / "uta" / "failure.json").exists()


def test_a_failure_says_which_attempt_it_ended(tmp_path: Path) -> None:
    attempted(tmp_path, 1)
    attempted(tmp_path, 12).report_failure(TrainingError("the loss is NaN 歌"))
    assert json.loads((tmp_path / "uta" / "failure.json").read_text())["attempt"] == 12


def test_a_driver_of_a_cluster_keeps_its_own_log_after_that_of_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in ((1, "始めます"), (2, "続けます")):
        with _log_kept(attempted(tmp_path, number)):
            print(text)
            print("警告", file=sys.stderr)
    kept = (tmp_path / "uta" / "logs" / "driver.log").read_text(encoding="utf-8")
    assert kept == "attempt 1 begins\n始めます\n警告\nattempt 2 begins\n続けます\n警告\n"
    assert "続けます" in capsys.readouterr().out

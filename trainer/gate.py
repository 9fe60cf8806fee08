"""The gate of retraining: a finished run against the champion it began from, by that run's own record.

A retraining begins with the champion's adapter, so what was measured and rendered at step 0 is the champion's, on the
very same songs, prompts and seeds. ``python -m trainer.gate RUN_URL`` judges a run that ``utaforge retrain`` made;
``--promote`` makes any finished run the champion, because a person wants it. Torch-free.
"""

import argparse
import getpass
import importlib.util
import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.champion import Champion, champion_at, champion_of, promote
from trainer.checkpoint import folder_of
from trainer.rundir import RunDirectory
from trainer.spec.errors import JobError, StoreError, UtaforgeError

log = logging.getLogger(__name__)
RETRAIN, VERDICT, REPORT = "retrain.json", "verdict.json", "report.md"
MIRROR_SECONDS = 120.0
Song = Mapping[str, Any]
"""One entry of ``measures.json``: ``file``, the prompt's fields, ``measures``."""


@dataclass(frozen=True)
class Rule:
    """How much worse than the champion's a song may measure.

    Attributes:
        measure: of ``trainer.audio.measures``.
        title: of it, for people.
        allowed: the largest change for the worse; negative where less is worse.
        lost: what has happened to a song that changed more.
    """

    measure: str
    title: str
    allowed: float
    lost: str

    def breaks(self, before: float, after: float) -> bool:
        """Whether the change from ``before`` to ``after`` is more than is allowed."""
        change = after - before
        return change > self.allowed if self.allowed > 0 else change < self.allowed


RULES = (
    # A fifth of the song: pauses between phrases differ by less from take to take, and a hole of that size is heard.
    Rule("silence_ratio", "silent", 0.2, "has fallen silent"),
    # One sample in a hundred at full scale crackles; a limiter leaves a hundredth of that.
    Rule("clipping_ratio", "clipped", 0.01, "is clipped"),
    # A song that ends on its own ends some seconds earlier or later; a tenth of what was asked for is a cut.
    Rule("duration_reached", "length reached", -0.1, "ends too early"),
)


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        promoted: whether the candidate is the champion now.
        reasons: why not; empty if it is.
        before: held-out loss of the champion.
        after: held-out loss of the candidate.
    """

    promoted: bool
    reasons: tuple[str, ...]
    before: float
    after: float


def judge(losses: tuple[float, float], before: Mapping[str, Song], after: Mapping[str, Song]) -> Verdict:
    """Compare a candidate with its champion: held-out loss has to fall, and no song may be lost.

    Args:
        losses: held-out loss of the champion and of the candidate.
        before: the champion's songs by file name.
        after: the candidate's.
    """
    reasons: list[str] = []
    if not losses[1] < losses[0]:
        reasons.append(f"held-out loss did not fall: {losses[0]:.4f} → {losses[1]:.4f}")
    for name, song in sorted(before.items()):
        if name not in after:
            reasons.append(f"{name} was not rendered")
            continue
        for rule in RULES:
            old, new = song["measures"][rule.measure], after[name]["measures"][rule.measure]
            if rule.breaks(old, new):
                reasons.append(f"{name} {rule.lost}: {rule.title} {old:.1%} → {new:.1%}")
    if not before:
        reasons.append("no song was rendered from the champion, so nothing can be compared")
    return Verdict(not reasons, tuple(reasons), *losses)


def settle(run: RunDirectory) -> Verdict:
    """Judge the retraining ``run``, promote it if it has earned it, and leave ``verdict.json`` and ``report.md``.

    Judging again a run that is the champion already changes nothing.

    Raises:
        UtaforgeError: the run is not finished, or the store failed.
    """
    number: int = json.loads(run.store.get(RETRAIN))["champion"]
    before, after = (_songs(run, step) for step in (0, run.job.train.steps))
    result = json.loads(run.store.get("result.json"))
    verdict = judge((result["loss_before"], result["loss_after"]), before, after)
    if verdict.promoted and not promote(run, "gate", number + 1):
        other = champion_at(run.job, number + 1)
        if other.run != run.name:
            reason = f"{other.run} became the champion meanwhile, by {other.by}; this run never met it"
            verdict = Verdict(False, (reason,), verdict.before, verdict.after)
    champion = champion_at(run.job, number) if number else None
    report = _report(run, verdict, champion, before, after)
    run.store.put(REPORT, report.encode())
    told = {"time": time.time(), **asdict(verdict), "champion": champion.run if champion else None}
    run.store.put(VERDICT, json.dumps(told, ensure_ascii=False, indent=1).encode())
    log.info("%s is %s", run.name, "promoted" if verdict.promoted else "rejected: " + "; ".join(verdict.reasons))
    return verdict


def choose(run: RunDirectory) -> Champion:
    """Make ``run`` the champion because a person wants it, an older one again or one that the gate rejected.

    Raises:
        JobError: the run is not finished, has no adapter, or is the champion already.
        StoreError: somebody else has been promoted at the same moment.
    """
    now = champion_of(run.job)
    if now and now.run == run.name:
        raise JobError(f"run {run.name} is the champion of {run.job.name} already", "there is nothing to do")
    new = promote(run, getpass.getuser(), now.number + 1 if now else 1)
    if new is None:
        raise StoreError(f"another run of {run.job.name} has been promoted at the same moment", "look, and try again")
    return new


def mirror(run: RunDirectory) -> None:
    """Tell MLflow, in a process of its own; where that fails the store's word stands and a later sync tells it."""
    if importlib.util.find_spec("mlflow"):
        command = [sys.executable, "-m", "trainer.tracking", run.url]
        try:
            if subprocess.run(command, check=False, timeout=MIRROR_SECONDS).returncode == 0:
                return
        except subprocess.TimeoutExpired:
            pass
    log.warning("MLflow does not know it yet: tell it with `utaforge sync %s`", run.name)


def main(argv: list[str] | None = None) -> int:
    """See ``--help``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.gate", description="Judge or promote a finished run.")
    parser.add_argument("run", help="URL of the run directory")
    parser.add_argument("--promote", action="store_true", help="promote it without judging it")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run = RunDirectory(args.run)
    try:
        if args.promote:
            log.info("%s is the champion of %s now", choose(run).run, run.job.name)
        else:
            settle(run)
    except UtaforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    mirror(run)
    return 0


def _songs(run: RunDirectory, step: int) -> dict[str, Song]:
    told = run.store.get_or_none(f"audio/{folder_of(step)}/measures.json")
    return {song["file"]: song for song in json.loads(told)["songs"]} if told else {}


def _report(
    run: RunDirectory,
    verdict: Verdict,
    champion: Champion | None,
    before: Mapping[str, Song],
    after: Mapping[str, Song],
) -> str:
    """The verdict in Markdown, for a person: the reasons, the data, and what to listen to."""
    rival = f"the champion {champion.run}" if champion else getattr(run.job.method, "init", None) or "the base model"
    trained = ", ".join(f"{pin['url']} version {pin['version']}" for pin in run.pinned_data["train"])
    judged = run.pinned_data["validation"]
    lines = [
        f"# {run.name}: {'promoted' if verdict.promoted else 'rejected'}",
        "",
        f"It started from {rival} and had to beat it.",
        "",
        *(f"- {reason}" for reason in verdict.reasons or ["held-out loss fell, and no song was lost"]),
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| held-out loss | {verdict.before:.4f} | {verdict.after:.4f} |",
        "",
        f"Trained on {trained}; judged on {judged['url']} version {judged['version']}.",
        "Whether it still sings, no measure here can tell: listen.",
    ]
    for name, song in sorted(before.items()):
        lines += ["", *_song_lines(name, song, after.get(name), run.job.train.steps)]
    return "\n".join([*lines, ""])


def _song_lines(name: str, before: Song, after: Song | None, steps: int) -> list[str]:
    asked = [f"> {line}" for field in ("tags", "lyrics") for line in before[field].splitlines()]
    rows = [
        f"| {rule.title} | {before['measures'][rule.measure]:.1%} | {_shown(after, rule.measure)} |" for rule in RULES
    ]
    places = [f"audio/{folder_of(step)}/{name}" for step in (0, steps)]
    return [
        f"## {name}, {before['seconds']:g} s, seed {before['seed']}",
        *asked,
        "",
        "| | before | after |",
        "|---|---|---|",
        *rows,
        f"| listen to | {places[0]} | {places[1] if after else '–'} |",
    ]


def _shown(song: Song | None, measure: str) -> str:
    return f"{song['measures'][measure]:.1%}" if song else "–"


if __name__ == "__main__":
    sys.exit(main())

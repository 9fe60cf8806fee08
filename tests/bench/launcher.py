"""How long the commands take, over a thousand runs.

The runs lie in S3 where ``UTAFORGE_TEST_S3`` names a server (``python -m tests.kubernetes.cluster env``), else in a
folder.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from trainer.spec import dump_job, load_job
from trainer.store import Store, open_store

from .figure import ROOT, Figure, middle

log = logging.getLogger(__name__)
RUNS = 1000
LIMITS = {"--help": 0.3, "plan": 0.7, "status": 1.5, "why": 1.5, "list": 3.0}
UTAFORGE = Path(sys.executable).with_name("utaforge")


def measure(repeats: int = 5) -> Figure:
    """Every command ``repeats`` times; the figure is the worst share of its limit that a median takes."""
    s3 = os.environ.get("UTAFORGE_TEST_S3")
    with tempfile.TemporaryDirectory(prefix="utaforge-bench-", dir="/tmp") as folder:
        url = _bucket(s3) if s3 else f"file://{folder}/store"
        fill(open_store(url).at("runs"), RUNS)
        commands = {
            "--help": ["--help"],
            "plan": ["plan", str(ROOT / "jobs" / "demo.yaml")],
            "status": ["status", "run-0010", "--store", url],
            "why": ["why", "run-0010", "--store", url],
            "list": ["list", "--store", url],
        }
        seconds = {name: [_seconds(command) for _ in range(repeats + 1)][1:] for name, command in commands.items()}
    for name, taken in seconds.items():
        log.info("%s: %s s, at most %g", name, middle(taken), LIMITS[name])
    worst = max(LIMITS, key=lambda name: median(seconds[name]) / LIMITS[name])
    return Figure(
        name="launcher",
        ours="; ".join(f"{name} {median(taken):.2f} s" for name, taken in seconds.items()),
        rival="; ".join(f"{name} ≤ {limit:g} s" for name, limit in LIMITS.items()),
        value=median(seconds[worst]) / LIMITS[worst],
        most=1.0,
        details={"seconds": seconds, "runs": RUNS, "store": "S3" if s3 else "a folder"},
    )


def fill(runs: Store, count: int) -> None:
    """Write ``count`` runs as the trainer leaves them: nine of ten finished, the others failed or cut off."""
    job = dump_job(load_job(ROOT / "jobs" / "demo.yaml")).encode()
    with ThreadPoolExecutor(16) as pool:
        for number in range(count):
            pool.submit(_fill, runs.at(f"run-{number:04d}"), number, job)


def _fill(run: Store, number: int, job: bytes) -> None:
    journal = [
        {"step": step, "time": 1.79e9 + step, "metrics": {"train/loss": 2.5 - step / 1000, "train/lr": 1e-4}}
        for step in range(5, 245, 5)
    ]
    attempt = {"number": 1, "time": 1.79e9, "host": "別の機械", "user": "歌", "backend": "local",
               "address": "http://127.0.0.1:1", "submission": f"{run.url}-1"}  # fmt: skip
    files: dict[str, bytes] = {
        "job.json": job,
        "plan.json": b"{}",
        "attempts/0001.json": json.dumps(attempt).encode(),
        "metrics.jsonl": "".join(f"{json.dumps(entry)}\n" for entry in journal).encode(),
        **{f"logs/{name}.log": "さくら さくら\n".encode() * 100 for name in ("driver", "rank-0", "rank-1")},
        **{f"checkpoints/step-{step:08d}/{name}": b"{}" for step in (180, 240) for name in ("a", "manifest.json")},
        **{f"audio/step-00000240/{name}.flac": b"" for name in "abcd"},
    }
    if number % 10:
        result = {"time": 1.79e9, "attempt": 1, "backend": "local", "steps": 240, "loss": 2.26}
        files["result.json"] = json.dumps(result).encode()
    elif number % 20:
        failure = {"time": 1.79e9, "attempt": 1, "problem": "壊れた", "cure": "直す", "exit_code": 4}
        files["failure.json"] = json.dumps(failure, ensure_ascii=False).encode()
    for path, content in files.items():
        run.put(path, content)


def _bucket(endpoint: str) -> str:
    import boto3

    os.environ["AWS_ENDPOINT_URL"] = endpoint
    name = f"utaforge-bench-{uuid.uuid4().hex[:8]}"
    client: Any = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=name)
    return f"s3://{name}"


def _seconds(command: Sequence[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([str(UTAFORGE), *command], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - begin

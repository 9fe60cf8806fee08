"""Ranks without Ray, forked from a process that has imported torch and all else that a rank needs.

Importing it anew in every rank takes 14 s of CPU, more than what tests have them compute.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from launcher.backends.local import free_ports
from tests.cluster.conftest import COMPILED

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["deepspeed", "trainer.worker", "trainer.families.musicgen.network"])


class Ranks:
    """Processes that call ``target(*arguments)`` as under ``torchrun``; what they say is kept in ``logs``."""

    def __init__(
        self, world: int, logs: Path, target: Callable[..., object], *arguments: object, **environment: str
    ) -> None:
        (port,) = free_ports(1)
        common = {
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(COMPILED)),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **environment,
        }
        self.logs = [logs / f"rank-{rank}-of-{world}.txt" for rank in range(world)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self.logs):
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _CONTEXT.Process(target=_begin, args=(log, own, target, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    def end(self, seconds: float = 900) -> None:
        """Wait until all have ended well; fails with the ends of their logs if one has not."""
        try:
            for process in self.processes:
                process.join(seconds)
        finally:
            codes = [process.exitcode for process in self.processes]
            self.kill()
        assert not any(code != 0 for code in codes), "\n".join(log.read_text()[-3000:] for log in self.logs)

    def kill(self) -> None:
        """``kill -9``."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def rank_of(run_url: str) -> None:
    """What ``python -m trainer.worker RUN_URL`` does."""
    from trainer.worker import main

    sys.exit(main([run_url]))


def _begin(log: Path, environment: Mapping[str, str], target: Callable[..., object], arguments: tuple) -> None:
    import torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)

"""Waiting for what others do."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SHORTEST, LONGEST = 0.05, 2.0
"""Seconds between two looks."""


def eventually(condition: Callable[[], T], seconds: float = 600.0) -> T:
    """The first true value of ``condition``; fails once ``seconds`` have passed without one.

    The longer a look takes, the less often it is taken: who waits leaves the cores to what is waited for.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        ended = time.monotonic()
        assert ended < deadline, "waited in vain"
        time.sleep(min(max(SHORTEST, 3 * (ended - began)), LONGEST))

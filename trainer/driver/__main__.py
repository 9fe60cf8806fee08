"""``python -m trainer.driver RUN_URL``: one attempt at a run; the exit status is the run's.

Whatever Python can tell of ends the run for good, code that cannot even be imported too: KubeRay would pay for other
clusters to see it again. So all else is imported inside.
"""

import sys
import traceback
from contextlib import suppress

from trainer.driver.kuberay import stop_for_good, under_kuberay

UNKNOWN = 6
"""The exit code of ``TrainingError``, where that cannot be imported."""


def main(argv: list[str] | None = None) -> int:
    """Run the job whose run directory is named by the argument; returns the exit status."""
    (run_url,) = argv if argv is not None else sys.argv[1:]
    try:
        from trainer.driver.attempt import attempt

        status = attempt(run_url)
    except Exception as error:  # noqa: BLE001  (nothing that Python can tell of is cured by another cluster)
        status = _tell(run_url, error)
    if status and under_kuberay():
        stop_for_good()
    return status


def _tell(run_url: str, error: Exception) -> int:
    """Print why the run cannot go on, and leave word of it where that can be done; returns the exit status."""
    try:
        from trainer.rundir import RunDirectory, unexpected
        from trainer.spec.errors import UtaforgeError
    except Exception:  # noqa: BLE001  (what is broken is what would tell it)
        traceback.print_exception(error)
        print(f"the trainer met an error of its own: {type(error).__name__}: {error}")  # noqa: T201
        print("  → correct the code, or go back to the image's own: leave out cluster.code")  # noqa: T201
        return UNKNOWN
    told = error if isinstance(error, UtaforgeError) else unexpected(error)
    print(told)  # noqa: T201
    with suppress(UtaforgeError):
        RunDirectory(run_url).report_failure(told)
    return told.exit_code


if __name__ == "__main__":
    sys.exit(main())

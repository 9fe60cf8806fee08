"""``python -m trainer.data JOB.json``: make the shards of a resolved job, here."""

import logging
import sys
from pathlib import Path

from trainer.data.prepare import prepare, progress_lines
from trainer.spec import job_from_json
from trainer.spec.errors import UtaforgeError


def main(argv: list[str] | None = None) -> int:
    """Prepare, with progress on standard error; returns the exit status."""
    (path,) = argv if argv is not None else sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        prepare(job_from_json(Path(path).read_text(encoding="utf-8")), progress_lines())
    except UtaforgeError as error:
        logging.getLogger(__name__).error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

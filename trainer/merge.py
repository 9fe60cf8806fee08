"""A run's weights as a release of their own: ``python -m trainer.merge RUN_URL TO_URL``, for ``utaforge merge``."""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from peft import PeftModel

from trainer.rundir import RunDirectory
from trainer.spec.errors import StoreError, UtaforgeError
from trainer.store import open_store
from trainer.validation.generate import load

log = logging.getLogger(__name__)


def merge(run: RunDirectory, to: str, step: str = "last") -> list[str]:
    """Put the run's network into ``to``, in upstream's format and in fp32; an adapter is merged into its base.

    Args:
        run: the run.
        to: URL of an empty folder, which ``model.pretrained`` can name afterwards.
        step: ``last``, ``best`` or a number.

    Returns:
        The names of the files.

    Raises:
        StoreError: the run has no such checkpoint, or there is something in ``to`` already.
    """
    target = open_store(to)
    if taken := next(target.list(), None):
        raise StoreError(f"{to} is not empty: it holds {taken.path}", "name a new folder; nothing is overwritten")
    target.check_writable()
    family, network = load(run, step)
    if isinstance(network, PeftModel):
        network = network.merge_and_unload()
    with tempfile.TemporaryDirectory(prefix="utaforge-merge-") as scratch:
        folder = Path(scratch, "release")
        family.save(network, folder, {})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        for path, name in zip(files, names, strict=True):
            target.upload(path, name)
    return names


def main(argv: list[str] | None = None) -> int:
    """See ``--help``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.merge", description=__doc__)
    parser.add_argument("run", help="URL of the run directory")
    parser.add_argument("to", help="URL of an empty folder")
    parser.add_argument("--step", default="last", help="last, best or a step's number")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        names = merge(RunDirectory(args.run), args.to, args.step)
    except UtaforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    log.info("%s: %s", args.to, ", ".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())

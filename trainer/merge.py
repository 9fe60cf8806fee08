"""What a run has learnt, in upstream's formats: ``python -m trainer.merge RUN_URL TO_URL``.

Whole weights for ``utaforge merge``, with ``--adapter`` the adapter for ``utaforge export``.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from trainer.families import open_family
from trainer.rundir import RunDirectory
from trainer.spec.errors import StoreError, UtaforgeError
from trainer.spec.model import Lora
from trainer.store import Store, open_store
from trainer.validation.generate import fetch, load

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
    target = _empty(to)
    family, network = load(run, step)
    if isinstance(network, PeftModel):
        network = network.merge_and_unload()
    return _put(lambda folder: family.save(network, folder, {}), target)


def export(run: RunDirectory, to: str, step: str = "last") -> list[str]:
    """Put the adapter of a LoRA run into ``to``, in the format of upstream's own adapters.

    Args:
        run: the run.
        to: URL of an empty folder.
        step: ``last``, ``best`` or a number.

    Returns:
        The names of the files.

    Raises:
        UtaforgeError: there is no adapter, upstream has no such format, or it cannot express the adapter.
        StoreError: as ``merge``.
    """
    if not isinstance(run.job.method, Lora):
        raise UtaforgeError(f"run {run.name} has trained every weight, not an adapter", "utaforge merge writes them")
    target = _empty(to)
    with tempfile.TemporaryDirectory(prefix="utaforge-export-") as scratch:
        adapter = Path(scratch)
        fetch(run, step, adapter, finished="adapter")
        return _put(lambda folder: open_family(run.job.model).export_adapter(adapter, folder), target)


def _empty(to: str) -> Store:
    target = open_store(to)
    if taken := next(target.list(), None):
        raise StoreError(f"{to} is not empty: it holds {taken.path}", "name a new folder; nothing is overwritten")
    target.check_writable()
    return target


def _put(write: Callable[[Path], None], target: Store) -> list[str]:
    """What ``write`` leaves in a folder, uploaded; the names of the files."""
    with tempfile.TemporaryDirectory(prefix="utaforge-merge-") as scratch:
        folder = Path(scratch, "release")
        write(folder)
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
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, in upstream's adapter format")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        names = (export if args.adapter else merge)(RunDirectory(args.run), args.to, args.step)
    except UtaforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    log.info("%s: %s", args.to, ", ".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m trainer.data.demo DIR [--songs N] [--style a|b|both] [--seed S]``."""

import argparse
import sys

from .songs import STYLES, write_songs


def main(argv: list[str] | None = None) -> int:
    """Write the demo songs, with a progress line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.data.demo", description="Write the demo songs.")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--songs", type=int, default=12)
    parser.add_argument("--style", choices=sorted(STYLES), default="both")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    write_songs(chosen.folder, chosen.songs, chosen.seed, chosen.style, _progress)
    return 0


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        sys.stderr.write(f"\rsong {done} of {total}" + ("\n" if done == total else ""))


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.bench [NAME…]``: measure the named figures, or those that take minutes; write ``results/``."""

import argparse
import logging
from importlib import import_module

from .figure import Figure, machine, save, show

USUAL = ("apparatus", "submit", "tiny")
LONG = ("fresh", "launcher", "kubernetes")


def main() -> None:
    """Measure, tell, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(USUAL)}; only by name: {', '.join(LONG)}")
    parser.add_argument("--repeats", type=int, help="how often each side is measured")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*USUAL, *LONG}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join((*USUAL, *LONG))}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"repeats": arguments.repeats} if arguments.repeats else {}
    where, figures = machine(), list[Figure]()
    for name in arguments.names or USUAL:
        before = machine()
        figures.append(import_module(f".{name}", __package__).measure(**options))
        save(name, figures[-1], before)
    show(figures, where)


if __name__ == "__main__":
    main()

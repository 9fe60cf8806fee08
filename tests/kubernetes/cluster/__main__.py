"""``python -m tests.kubernetes.cluster up | down | status | env``."""

import shlex
import sys

from trainer.spec.errors import UtaforgeError

from .control import down, environment, status, up
from .layout import Layout


def main(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    match arguments:
        case ["up"]:
            layout = Layout.of_environment()
            up(layout, lambda line: print(line, flush=True))
            print('up; to use it: eval "$(python -m tests.kubernetes.cluster env)"')
        case ["down"]:
            down(Layout.of_environment())
        case ["status"]:
            states = status(Layout.of_environment())
            print("\n".join(f"{name:24} {state}" for name, state in states.items()))
            return int(any(not state.startswith("well") for state in states.values()))
        case ["env"]:
            for name, value in environment(Layout.of_environment()).items():
                print(f"export {name}={shlex.quote(value)}")
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UtaforgeError as error:
        sys.exit(str(error))

"""What launcher and trainer agree on about files of a run directory."""

DRIVER_LOG = "logs/driver.log"


def attempt_begins(number: int) -> str:
    """The line of the driver's log after which attempt ``number`` speaks, where the driver itself keeps that log."""
    return f"attempt {number} begins"

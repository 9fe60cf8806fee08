"""Prints the software bill of materials of an image that is being built, as CycloneDX JSON: Python and Debian packages.

Runs below the Python that has ``cyclonedx-bom``; https://cyclonedx.org/docs/1.6/json/ is the format.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = "/opt/utaforge/bin/python"


def main(image: str) -> None:
    """Print the bill of ``image``: ``trainer`` or ``launcher``."""
    tool = Path(sys.executable).parent / "cyclonedx-py"
    bill = json.loads(_output(tool, "environment", "--output-reproducible", "--spec-version", "1.6", ENVIRONMENT))
    bill["metadata"]["component"] = {"type": "container", "name": f"utaforge-{image}", "bom-ref": "image"}
    bill["components"] += _system_packages()
    json.dump(bill, sys.stdout, indent=1)


def _system_packages() -> list[dict[str, str]]:
    system = platform.freedesktop_os_release()
    distribution, release = system["ID"], system["VERSION_ID"]
    found: list[dict[str, str]] = []
    for line in _output("dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n").splitlines():
        name, version, architecture = line.split()
        purl = f"pkg:deb/{distribution}/{name}@{version}?arch={architecture}&distro={distribution}-{release}"
        found.append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return found


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1])

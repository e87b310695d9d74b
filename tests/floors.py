"""The lowest versions that pyproject.toml admits, as constraints for pip: `python tests/floors.py` prints them.

`make test-oldest` installs them. `--torch VERSION` stands for torch's own floor: another torch than the one at hand may
mean gigabytes.
"""

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def floors(project: dict) -> dict[str, str]:
    """The lowest version of every dependency that has one, those of all extras included."""
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    found = [re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def main() -> None:
    """Print one constraint a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="the version of torch to take instead of its lowest")
    given = parser.parse_args()
    lowest = floors(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    lowest |= {"torch": given.torch} if given.torch else {}
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest.items())))


if __name__ == "__main__":
    main()

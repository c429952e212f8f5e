"""Cut what one image installs out of requirements.lock, hashes and all.

    python image_lock.py runtime    what the project needs to run
    python image_lock.py build      what builds its wheel
    python image_lock.py all        everything, with what the demonstration and the tests need

The lock holds one set of packages that fit each other; an image takes a part of it. Which part is
read from the "# via" comments, which say who asked for a package.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# As uv writes a requirement: its name at the start of a line, all else indented.
_BLOCK = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==.*\n(?:[ ].*\n)*", re.MULTILINE)
_VIA = re.compile(r"^    #(?: via)? +(?P<name>[a-z0-9][a-z0-9._-]*)$", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Locked:
    """One requirement of the lock.

    Attributes:
        text: its lines, as they stand.
        wanted_by: packages that asked for it.
    """

    name: str
    text: str
    wanted_by: frozenset[str]


def read_lock(text: str) -> list[Locked]:
    """Every requirement, in order; a package may have several, for several Pythons."""
    return [
        Locked(
            name=block["name"],
            text=block[0],
            wanted_by=frozenset(via["name"] for via in _VIA.finditer(block[0])),
        )
        for block in _BLOCK.finditer(text)
    ]


def select(lock: Sequence[Locked], roots: Sequence[str]) -> list[Locked]:
    """The roots and all that they need, directly or not.

    Raises:
        SystemExit: a root is not in the lock.
    """
    names = {locked.name for locked in lock}
    missing = sorted(set(roots) - names)
    if missing:
        raise SystemExit(f"requirements.lock lacks {', '.join(missing)}; run make lock")
    needed = set(roots)
    while True:
        found = {locked.name for locked in lock if locked.wanted_by & needed} - needed
        if not found:
            return [locked for locked in lock if locked.name in needed]
        needed |= found


def roots(project: Mapping[str, object], part: str) -> list[str]:
    """Names of the packages that pyproject.toml asks for itself."""
    match part:
        case "runtime":
            wanted = project["project"]["dependencies"]  # type: ignore[index]
        case "build":
            wanted = project["dependency-groups"]["build"]  # type: ignore[index]
        case _:
            raise ValueError(part)
    return [_NAME.match(line)[0].lower().replace("_", "-") for line in wanted]  # type: ignore[index]


def main() -> None:
    """Print the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("runtime", "build", "all"))
    parser.add_argument("--lock", type=Path, default=Path("requirements.lock"))
    parser.add_argument("--project", type=Path, default=Path("pyproject.toml"))
    given = parser.parse_args()
    lock = read_lock(given.lock.read_text(encoding="utf-8"))
    if given.part != "all":
        project = tomllib.loads(given.project.read_text(encoding="utf-8"))
        lock = select(lock, roots(project, given.part))
    sys.stdout.write("".join(locked.text for locked in lock))


if __name__ == "__main__":
    main()

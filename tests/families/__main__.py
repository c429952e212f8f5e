"""Try every family of KerasHub, and print what works as a table; with --write, into docs.

python -m tests.families [--write] [FAMILY …]
"""

from __future__ import annotations

import argparse
import sys

from tests.families.matrix import matrix
from tests.families.support_table import PAGE, page
from tests.families.tiny_families import FAMILIES


def main() -> None:
    """Try the families that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="only these")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} anew")
    given = parser.parse_args()
    unknown = set(given.families) - {family.name for family in FAMILIES}
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    if given.write and given.families:
        parser.error("the page is of all families")
    outcomes = []
    for outcome in matrix([f for f in FAMILIES if not given.families or f.name in given.families]):
        outcomes.append(outcome)
        kind = f"{outcome.kind} {outcome.message}".strip()
        print(f"{outcome.family}, {outcome.scheme}: {kind}", file=sys.stderr, flush=True)
    if given.write:
        PAGE.write_text(page(outcomes), encoding="utf-8")
    else:
        print(page(outcomes))
    if any(outcome.kind == "fails" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Where the `quantfleet` command begins: signals are caught before anything else is imported."""

from __future__ import annotations

import sys

from jobs.termination import Terminated, terminable


def main() -> None:
    """Run the command line (see `jobs.cli.main`)."""
    try:
        with terminable():
            from jobs.cli.main import main as run_command

            run_command()
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

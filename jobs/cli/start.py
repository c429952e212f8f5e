"""Where the `quantfleet` command begins: signals are caught before anything else is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jobs.termination import Terminated, terminable


def main() -> None:
    """Run the command line (see `jobs.cli.main`)."""
    open_closed_streams()
    try:
        with terminable():
            from jobs.cli.main import main as run_command

            run_command()
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)


def open_closed_streams() -> None:
    """Give this process, and those that it starts, standard streams to nowhere in place of none.

    Otherwise the first files that are opened get their numbers, and with them what a library, or
    another process, has to say; and Ray does not start.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (until the end)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


if __name__ == "__main__":
    main()

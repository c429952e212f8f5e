"""`python -m jobs` is `quantfleet`."""

from jobs.cli import main

main()

"""`python -m jobs` is `quantfleet`."""

from jobs.cli import main

if __name__ == "__main__":
    main()

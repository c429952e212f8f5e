"""`python -m jobs` is `quantfleet`."""

from jobs.cli.main import main

if __name__ == "__main__":
    main()

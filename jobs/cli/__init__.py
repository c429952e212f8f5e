"""The `quantfleet` command."""

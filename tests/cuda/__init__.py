"""What can be said of GPUs on a machine that has none."""

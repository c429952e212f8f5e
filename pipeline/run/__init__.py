"""The life of one run: driver, records, commits, lease, activations, events, garbage."""

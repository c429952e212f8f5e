"""Where work runs: the protocol, the local executor, and Ray. The only home of ray."""

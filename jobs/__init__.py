"""Many models: what a person or a scheduler starts."""

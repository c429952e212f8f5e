"""A source model's weights, read variable by variable."""

"""A finished artifact in the formats of other runtimes: the same codes, not solved again."""

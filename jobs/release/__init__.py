"""What a release needs besides its files: a model card, eval.json, and the way to a hub."""

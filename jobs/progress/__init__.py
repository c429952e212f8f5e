"""What a person sees of work that is under way."""

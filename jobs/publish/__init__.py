"""Publishing: verdicts on results, and the releases that readers get."""

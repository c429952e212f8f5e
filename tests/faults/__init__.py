"""What goes wrong, made to go wrong; README.md lists it."""

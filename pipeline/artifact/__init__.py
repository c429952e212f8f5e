"""The result: weights files and JSON that stock Keras loads."""

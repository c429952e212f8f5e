"""Quantize a plain Keras model from its `.keras` file, in one process."""

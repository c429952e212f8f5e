"""Models and text for tests and benchmarks; nothing is downloaded."""

import os

# Before Keras is imported, as it is by nearly every module here.
os.environ.setdefault("KERAS_BACKEND", "jax")

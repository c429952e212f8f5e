"""Measurements: how fast, how accurate and how large, side by side with what Keras ships.

python -m tests.benchmarks.solver
python -m tests.benchmarks.accuracy
python -m tests.benchmarks.memory
"""

import os

# Keras chooses TensorFlow when nobody chooses.
os.environ.setdefault("KERAS_BACKEND", "jax")

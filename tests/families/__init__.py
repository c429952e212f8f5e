"""Every family of KerasHub, tried: what can be quantized, and what is refused with which words."""

import os

# Left to itself, Keras chooses TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")

"""What must hold before any test module is imported."""

import os

# Keras chooses TensorFlow when nobody chooses.
os.environ.setdefault("KERAS_BACKEND", "jax")

from hypothesis import settings

# An example that compiles is slow once and fast after: a deadline would only be flaky.
# Built on the current profile: with CI set that is Hypothesis' own deterministic one.
settings.register_profile("quantfleet", settings.default, deadline=None)
settings.load_profile("quantfleet")

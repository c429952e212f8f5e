"""A model: preset, weightless skeleton, blocks, layouts; the only home of private Keras API."""

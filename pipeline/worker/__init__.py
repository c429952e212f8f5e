"""What one worker does, with JAX and Keras; the driver imports none of it."""

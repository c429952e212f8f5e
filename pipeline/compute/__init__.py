"""What workers compute, with JAX and Keras; the driver imports none of it."""

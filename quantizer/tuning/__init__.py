"""Tuning: a quantized block's roundings, scales and norms, trained by gradient descent."""

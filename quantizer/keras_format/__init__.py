"""How stock Keras stores quantized layers: layouts, variables, live layers."""

"""How stock Keras stores quantized layers: layouts, variables, layers."""

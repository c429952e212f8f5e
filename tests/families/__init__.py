"""Every family of KerasHub, tried: what can be quantized, and what is refused with which words."""

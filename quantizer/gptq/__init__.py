"""GPTQ: the factor, the column loop, refinement, and whole layers."""

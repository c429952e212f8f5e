"""Generate text with stock KerasHub alone. `python -I` keeps quantfleet from being imported."""

import argparse
import sys

if __name__ == "__main__":
    for package in ("quantizer", "pipeline", "jobs"):
        sys.modules[package] = None  # importing it now raises ImportError

    import keras_hub

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    model = keras_hub.models.CausalLM.from_preset(parser.parse_args().preset)
    model.compile(sampler="greedy")
    policies = {layer.dtype_policy.name for layer in model.backbone._flatten_layers()}
    print(f"loaded by stock KerasHub {keras_hub.__version__}: {', '.join(sorted(policies))}")
    for prompt in ("The capital of France is", "A list in Python is"):
        print(f"> {model.generate(prompt, max_length=32)}")

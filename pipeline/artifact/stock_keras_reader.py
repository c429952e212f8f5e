"""Run as a script by `verification`: stock Keras, without quantfleet, runs a `.keras` file.

    KERAS_BACKEND=… python -I stock_keras_reader.py

Standard input is JSON, {"model"}: the file. Standard output is JSON: the shapes of the outputs for
two samples of zeros, whether all of them are finite, backend and version.
"""

import json
import sys
from typing import Any

if __name__ == "__main__":
    for _package in ("quantizer", "pipeline", "jobs"):
        # This makes importing it raise ImportError.
        sys.modules[_package] = None  # type: ignore[assignment]

import keras
import numpy as np

_SAMPLES, _ANY_SIZE = 2, 4


def zeros(tensor: Any) -> Any:
    """Samples of zeros for an input of a model."""
    shape = [_ANY_SIZE if size is None else size for size in tensor.shape[1:]]
    return keras.ops.zeros((_SAMPLES, *shape), dtype=tensor.dtype)


def main() -> None:
    """Load and run the model named on standard input."""
    model = keras.models.load_model(json.load(sys.stdin)["model"])
    # A Sequential model has no `input` before it is called.
    wanted = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    found = model(keras.tree.map_structure(zeros, wanted))
    outputs = [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(found)]
    answer = {
        "shapes": [list(output.shape) for output in outputs],
        "finite": all(bool(np.isfinite(output.astype("float32")).all()) for output in outputs),
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

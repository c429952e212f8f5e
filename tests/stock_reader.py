"""Run by tests as a script: stock Keras, without quantfleet, reads saved models.

    KERAS_BACKEND=… python stock_reader.py FOLDER

For each FOLDER/<name>.keras, runs the model on `inputs` of <name>.npz and prints as JSON the
largest difference from `outputs`, relative to the largest output.
"""

import json
import pathlib
import sys

sys.modules["quantizer"] = None  # importing it now raises ImportError

import keras  # noqa: E402
import numpy as np  # noqa: E402

differences = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.keras")):
    case = np.load(path.with_suffix(".npz"))
    model = keras.models.load_model(path)
    answer = keras.ops.convert_to_numpy(model(case["inputs"]))
    expected = case["outputs"]
    differences[path.stem] = float(np.abs(answer - expected).max() / np.abs(expected).max())
print(json.dumps({"backend": keras.backend.backend(), "differences": differences}))

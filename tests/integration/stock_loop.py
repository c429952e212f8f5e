"""Run as a script by `stock_session`: stock KerasHub, without quantfleet, loads presets on request.

    KERAS_BACKEND=… python -I stock_loop.py …/pipeline/artifact/stock_reader.py

Each request is a line of JSON: {"preset", "outputs"}, with "inputs", a file of arrays by name or of
token ids alone, and "eagerly", whether the model runs uncompiled, or "texts", a list of
strings; and "task", the class to load if there is no task.json to name it. Each response is a line
of JSON: {"quantized"}, the mode of each quantized layer, or {"error"}. The model's output is
written to the file `outputs`.
"""

import importlib.util
import json
import pathlib
import sys
import traceback

if __name__ == "__main__":
    for _package in ("quantizer", "pipeline", "jobs"):
        # Importing it now raises ImportError.
        sys.modules[_package] = None  # type: ignore[assignment]

import keras
import keras_hub
import numpy as np


def _stock_reader():
    spec = importlib.util.spec_from_file_location("stock_reader", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _task_name(preset):
    return json.loads((preset / "task.json").read_text(encoding="utf-8"))["class_name"]


def _answer(job, run_model):
    preset = pathlib.Path(job["preset"])
    name = job.get("task") or _task_name(preset)
    task = getattr(keras_hub.models, name).from_preset(str(preset))
    if "texts" in job:
        found = keras.ops.convert_to_numpy(_embedded(task, job["texts"]))
    else:
        arrays = dict(np.load(job["inputs"], allow_pickle=False))
        task.run_eagerly = job["eagerly"]
        found = run_model(task, arrays.get("", arrays))
    np.save(job["outputs"], np.asarray(found, "float32"))
    modes = {
        layer.path: getattr(layer, "quantization_mode", None)
        for layer in task.backbone._flatten_layers()
    }
    return {"quantized": {path: mode for path, mode in modes.items() if mode is not None}}


def _embedded(task, texts):
    return keras.ops.convert_to_numpy(task(task.preprocessor(texts)))


def main():
    run_model = _stock_reader().run_model
    for line in sys.stdin:
        keras.backend.clear_session()
        try:
            reply = _answer(json.loads(line), run_model)
        except (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError):
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()

"""Run as a script by `verification`: stock KerasHub, without quantfleet, runs presets.

    KERAS_BACKEND=… python -I stock_reader.py

Standard input is a JSON list of {"preset", "inputs", "outputs"}: a folder, a file of token ids, and
where to save the output of the task for them. Standard output is JSON: backend and version.
"""

import json
import pathlib
import sys

if __name__ == "__main__":
    for _package in ("quantizer", "pipeline", "jobs"):
        # This makes importing it raise ImportError.
        sys.modules[_package] = None  # type: ignore[assignment]

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray


def run_model(task: keras.Model, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The output of a KerasHub text model for token ids [batch, sequence] without padding."""
    positions = np.arange(token_ids.shape[1], dtype="int32")
    known = {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "segment_ids": np.zeros_like(token_ids),
        # A masked language model predicts at these positions: everywhere.
        "mask_positions": np.broadcast_to(positions, token_ids.shape),
    }
    # A preprocessor would expect text.
    task.preprocessor = None
    answer = task.predict_on_batch({name: known[name] for name in task.input})
    return np.asarray(answer, dtype="float32")


def main() -> None:
    """Load and run the presets listed on standard input."""
    for job in json.load(sys.stdin):
        preset = pathlib.Path(job["preset"])
        name = json.loads((preset / "task.json").read_text(encoding="utf-8"))["class_name"]
        task = getattr(keras_hub.models, name).from_preset(str(preset))
        token_ids = np.load(job["inputs"], allow_pickle=False)
        np.save(job["outputs"], run_model(task, token_ids))
    used = {"backend": keras.backend.backend(), "keras_hub": keras_hub.__version__}
    sys.stdout.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()

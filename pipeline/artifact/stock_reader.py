"""Run as a script by `verification`: stock KerasHub, without quantfleet, runs presets.

    KERAS_BACKEND=… python -I stock_reader.py

Standard input is a JSON list of {"preset", "inputs", "outputs"}: a folder, a file of token ids or
of all arrays that the model takes, and where to save its output for them. Standard output is JSON:
backend and version.
"""

import json
import pathlib
import sys
from typing import Any

if __name__ == "__main__":
    for _package in ("quantizer", "pipeline", "jobs"):
        # This makes importing it raise ImportError.
        sys.modules[_package] = None  # type: ignore[assignment]

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray


def run_model(task: keras.Model, inputs: Any) -> NDArray[np.float32]:
    """The output of a KerasHub model; of several outputs, all numbers in a row.

    Args:
        inputs: arrays by name, or token ids [batch, sequence] of a text without padding.
    """
    # A preprocessor would expect text.
    task.preprocessor = None
    arrays = inputs if isinstance(inputs, dict) else _text_inputs(inputs)
    answer = task.predict_on_batch({name: arrays[name] for name in task.input})
    found = [np.asarray(one, dtype="float32") for one in keras.tree.flatten(answer)]
    return found[0] if len(found) == 1 else np.concatenate([one.ravel() for one in found])


def _text_inputs(token_ids: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
    positions = np.arange(token_ids.shape[1], dtype="int32")
    return {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "segment_ids": np.zeros_like(token_ids),
        # A masked language model predicts at these positions: everywhere.
        "mask_positions": np.broadcast_to(positions, token_ids.shape),
    }


def load(preset: pathlib.Path) -> keras.Model:
    """The task of a preset; its backbone if KerasHub has no task for it."""
    if (preset / "task.json").exists():
        name = json.loads((preset / "task.json").read_text(encoding="utf-8"))["class_name"]
        return getattr(keras_hub.models, name).from_preset(str(preset))
    config = json.loads((preset / "config.json").read_text(encoding="utf-8"))
    backbone = getattr(keras_hub.models, config["class_name"])
    # It ignores the dtype in its own config (keras-hub 0.32).
    return backbone.from_preset(str(preset), dtype=config["config"]["dtype"])


def main() -> None:
    """Load and run the presets listed on standard input."""
    for job in json.load(sys.stdin):
        preset = pathlib.Path(job["preset"])
        inputs = np.load(job["inputs"], allow_pickle=False)
        arrays = dict(inputs) if isinstance(inputs, np.lib.npyio.NpzFile) else inputs
        np.save(job["outputs"], run_model(load(preset), arrays))
    used = {"backend": keras.backend.backend(), "keras_hub": keras_hub.__version__}
    sys.stdout.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()

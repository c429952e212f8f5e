"""Tiny presets, made once for a test session, and what stock KerasHub loads from them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import keras_hub
import numpy as np
from numpy.typing import NDArray

from tests.models.stock_load import load_stock
from tests.models.tiny import ARCHITECTURES, tiny_preset


@cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="presets-"))
    atexit.register(shutil.rmtree, path)
    return path


@cache
def shared_preset(architecture: str, **options: Any) -> Path:
    """A tiny preset that several tests read and none changes."""
    name = "-".join([architecture, *(f"{key}-{options[key]}" for key in sorted(options))])
    return tiny_preset(architecture, _folder() / name, **options)


def overflowing_preset(folder: Path) -> Path:
    """A float16 Llama whose gates and their inputs are large: their product exceeds 65504."""
    preset = tiny_preset("Llama3", folder, dtype="float16", num_blocks=1)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        for name in ("gate", "intermediate"):
            kernel = file[f"layers/llama_transformer_decoder/_feedforward_{name}_dense/vars/0"]
            kernel[...] = kernel[...] * np.float16(2000)
    return preset


@cache
def stock_task(architecture: str, **options: Any) -> Any:
    """What stock KerasHub loads from the shared preset; not to be changed either."""
    task_class: Any = getattr(keras_hub.models, ARCHITECTURES[architecture].task)
    return load_stock(task_class, shared_preset(architecture, **options))


def example_inputs(task: Any) -> dict[str, NDArray[np.int32]]:
    """Two sequences of twelve tokens, the second one padded at its end."""
    shape = (2, 12)
    token_ids = np.random.default_rng(0).integers(5, task.backbone.vocabulary_size, shape)
    inputs = {
        "token_ids": token_ids.astype(np.int32),
        "padding_mask": np.ones(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "mask_positions": np.array([[1, 2], [3, 4]], np.int32),
    }
    inputs["padding_mask"][1, 9:] = 0
    return {name: inputs[name] for name in task.input}

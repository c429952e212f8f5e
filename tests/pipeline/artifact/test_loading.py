"""The lines by which users load an artifact are run as they are printed, by stock KerasHub."""

from __future__ import annotations

import json
import pathlib
import re
from pathlib import Path
from typing import Any

import jax
import keras
import keras_hub
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifact.loading import load_call, load_call_in, load_hints
from pipeline.storage.object_store import ObjectStore, open_store
from quantizer.schemes import Int8Scheme
from tests.integration.quantized import SCHEMES, distance, finished_run, recipe
from tests.pipeline.presets import shared_preset
from tests.selection import by_default

TOKENS = np.arange(5, 21, dtype=np.int32)[None]
# Of float8, inputs are rounded to three bits, so that any other rounding before is seen.
TOLERANCE = {"float8": 0.3}


def loaded(line: str) -> Any:
    """What a line of Python makes."""
    return eval(line, {"json": json, "keras_hub": keras_hub, "pathlib": pathlib})  # noqa: S307


def answer(model: Any) -> NDArray[Any]:
    model.preprocessor = None
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    return np.asarray(jax.jit(lambda: model(inputs))(), "float32")  # in one compilation


def compute_dtypes(model: Any) -> set[str]:
    """Of all layers that stock Keras made quantized."""
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "quantization_mode", 0)]
    assert layers
    return {str(layer.compute_dtype) for layer in layers}


@pytest.mark.parametrize(
    "scheme",
    [
        *by_default(["gptq4", "int8"], ["int8"]),
        *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES if s not in ("gptq4", "int8")),
    ],
)
def test_an_artifact_answers_in_its_own_dtype_and_in_another(scheme: str, tmp_path: Path) -> None:
    wanted = recipe(SCHEMES[scheme], embeddings=Int8Scheme())
    run = finished_run(shared_preset("Llama3"), wanted, tmp_path)
    own, other = (hint.partition(":  ")[2] for hint in load_hints(run.store))
    keras.config.set_dtype_policy("bfloat16")  # the artifact's own counts
    try:
        model = loaded(own)
    finally:
        keras.config.set_dtype_policy("float32")
    assert compute_dtypes(model) == {"float32"}
    expected = answer(model)
    changed = loaded(other)
    assert compute_dtypes(changed) == {"bfloat16"}
    assert changed.compute_dtype == "bfloat16"
    assert 0 < distance(answer(changed), expected) < TOLERANCE.get(scheme, 0.1)


@pytest.mark.exhaustive
def test_what_is_saved_in_halves_computes_in_float32(tmp_path: Path) -> None:
    run = finished_run(shared_preset("Llama3", dtype="bfloat16"), recipe(SCHEMES["int4"]), tmp_path)
    own, other = (hint.partition(":  ")[2] for hint in load_hints(run.store))
    assert other.count("float32") == 1
    assert distance(answer(loaded(other)), answer(loaded(own))) < 0.1


@pytest.mark.exhaustive
def test_a_dtype_by_its_name_makes_kerashub_drop_the_saved_ones(tmp_path: Path) -> None:
    """Should this fail with a newer KerasHub, the other lines can be shorter."""
    run = finished_run(shared_preset("Llama3"), recipe(SCHEMES["int8"]), tmp_path)
    task, backbone = keras_hub.models.Llama3CausalLM, keras_hub.models.Llama3Backbone
    for call in (
        lambda: task.from_preset(str(run.artifact), dtype="bfloat16"),
        lambda: backbone.from_preset(str(run.artifact)),
    ):
        with pytest.raises(ValueError, match="objects could not be loaded"):
            call()
    line = load_call("Llama3Backbone", repr(str(run.artifact)))
    assert compute_dtypes(loaded(line)) == {"float32"}
    line = load_call_in("bfloat16", "Llama3Backbone", repr(str(run.artifact)), "float32")
    assert compute_dtypes(loaded(line)) == {"bfloat16"}


def stored(url: str, **files: Any) -> ObjectStore:
    store = open_store(url)
    for name, content in files.items():
        store.put(f"artifact/{name}.json", json.dumps(content).encode())
    return store


CONFIG = {
    "class_name": "WhisperBackbone",
    "config": {"dtype": {"config": {"default_policy": "float32"}}},
}


def test_a_folder_in_object_storage_is_to_be_copied_first() -> None:
    store = stored("memory://loading", config=CONFIG, task={"class_name": "Llama3CausalLM"})
    own, other = load_hints(store)
    assert own == (
        "load it:  copy memory://loading/artifact to a local folder, then "
        "keras_hub.models.Llama3CausalLM.from_preset(folder)"
    )
    assert re.search(r"bfloat16 instead of float32:  .*from_preset\(folder, dtype=", other)


def test_a_backbone_without_a_task_is_given_its_own_dtype() -> None:
    own, _ = load_hints(stored("memory://loading-backbone", config=CONFIG))
    assert "WhisperBackbone.from_preset(folder, dtype=json.loads(" in own

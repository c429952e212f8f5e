"""What is read from Hugging Face folders computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from pipeline.model.huggingface import check_converted
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.weights.source import open_source
from tests.models.transformers_answers import (
    CASES,
    folder_of,
    sampled,
    stored_answer,
    tokens,
)
from tests.selection import by_default

# KerasHub's BERT has the other form of gelu.
TOLERANCES = {"bert": 4e-4}


@pytest.mark.parametrize("name", by_default(CASES, ["llama with a large epsilon", "xlm-roberta"]))
def test_transformers_answers_the_same(name: str, tmp_path: Path) -> None:
    preset = read_preset(str(folder_of(name, tmp_path)))
    skeleton = build_skeleton(preset)
    check_converted(preset, skeleton.backbone, skeleton.predicts_tokens)
    source = open_source(preset, skeleton)
    source.check_complete()
    values = source.read(source.paths)
    for variable in skeleton.model.variables:
        if variable.path in values:
            variable.assign(values[variable.path])
    given = tokens()
    inputs = {"token_ids": given, "padding_mask": np.ones_like(given)}
    inputs["segment_ids"] = np.zeros_like(given)
    model = skeleton.task if skeleton.predicts_tokens else skeleton.backbone
    taken = {key: inputs[key] for key in skeleton.backbone.input}
    output = jax.jit(lambda: model(taken))()  # in one compilation
    if isinstance(output, dict):
        output = output["sequence_output"]
    found, expected = sampled(np.asarray(output)), stored_answer(name)
    assert np.abs(found - expected).max() < TOLERANCES.get(name, 3e-5) * np.abs(expected).max()

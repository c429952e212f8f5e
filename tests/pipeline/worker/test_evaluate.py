"""Evaluation finds what stock Keras would, and says where a result cannot be used."""

from __future__ import annotations

from pathlib import Path

import keras_hub
import numpy as np
import pytest

from jobs.publish.verdict import failures
from pipeline.calibration.windows import TokenWindows
from pipeline.fidelity import average
from pipeline.worker.evaluate import evaluate
from pipeline.worker.streamed_model import artifact_model, source_model
from tests.integration.quantized import SCHEMES, finished_run, recipe
from tests.pipeline.presets import overflowing_preset


@pytest.mark.parametrize("scheme", ["int4", "gptq8"])
@pytest.mark.exhaustive
def test_float16_overflows_in_the_evaluation_as_in_stock_keras(scheme: str, tmp_path: Path) -> None:
    run = finished_run(
        overflowing_preset(tmp_path / "in"), recipe(SCHEMES[scheme]), tmp_path / "out"
    )
    tokens = np.arange(5, 29, dtype="int32").reshape(2, 12)
    stock = keras_hub.models.CausalLM.from_preset(str(run.artifact))
    logits = stock({"token_ids": tokens, "padding_mask": np.ones((2, 12), bool)})
    assert not np.isfinite(logits).any()
    artifact = artifact_model(run.model, run.store)
    windows = TokenWindows(
        tokens=tokens, lengths=np.array([12, 3], np.int32), fingerprint="", num_documents=1
    )
    fidelity = average(
        evaluate(
            source_model(run.model),
            artifact,
            run.model.layout,
            windows,
            [0, 1],
            predicts_tokens=True,
        )
    )
    assert fidelity.not_finite is not None
    assert "2 of 2 windows" in fidelity.not_finite
    assert fidelity.not_finite.count("block 0 (transformer_layer_0)") == 2, "in the source, too"
    assert failures(None, fidelity) == (fidelity.not_finite,)

"""Stock KerasHub runs results that take more than one text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact.verification import ask_stock, example_inputs
from tests.families.tiny_families import shared_family


@pytest.mark.exhaustive
def test_stock_runs_models_of_two_texts_of_sounds_and_of_images() -> None:
    families = ("Bart", "Whisper", "Gemma4 with vision")
    folders = [Path(shared_family(family)) for family in families]
    answer = ask_stock(folders, [example_inputs(folder) for folder in folders])
    logits, numbers, seeing = answer.outputs
    assert logits.shape == (1, 7, 288)
    assert numbers.shape == (8 * 32 + 16 * 32,)  # of encoder and decoder
    assert seeing.shape == (1, 16, 288)
    assert all(np.isfinite(found).all() for found in answer.outputs)

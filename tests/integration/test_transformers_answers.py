"""What is read from Hugging Face folders computes what transformers computes, before and after.

Every converter of KerasHub for text is here but those whose models are refused in any form: Gemma
3n, SmolLM3, T5Gemma 2 and Gemma 4's assistants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pipeline.calibration.windows import TokenWindows
from pipeline.model.huggingface import check_converted
from pipeline.model.inputs import InputBatch, input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.weights.source import open_source
from pipeline.worker.streamed_model import artifact_model
from quantizer.schemes import Int8Scheme
from tests.integration.quantized import answer_to, finished_run, recipe
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
ROUNDED = 0.15
"""Of int8 weights and inputs, in models this small: the difference's norm by the answer's."""
LINEAR_ATTENTION = ["qwen3_5", "qwen3_5_moe, as saved"]  # which compiles slowly
MORE = [
    *LINEAR_ATTENTION,
    "gemma3",
    "mixtral with scaled positions",
    "qwen2 with scaled positions",
    "qwen2_moe with scaled weights",
    "qwen3 with scaled positions",
]
# Whose answers say little after rounding: it changes the choice of experts, and Gemma 4 of random
# weights makes most of it; artifacts of embedders answer with one vector.
NOT_ROUNDED = {
    case for case in CASES if case.startswith(("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"))
}
NOT_ROUNDED |= {"bert", "gemma4", "gemma4 with experts", "xlm-roberta", *LINEAR_ATTENTION}


EIGHT_BITS = ["llama, as saved", "mistral with scaled positions"]


def cases(default: Collection[str], exhaustive: Collection[str], slow: Iterable[str]) -> list[Any]:
    """Cases with the marks that say when they run."""
    often = [case for case in CASES if case in (*default, *exhaustive)]
    return [*by_default(often, default), *(pytest.param(c, marks=pytest.mark.slow) for c in slow)]


def asked(skeleton: Skeleton) -> InputBatch:
    """The tokens, and a black image at most; both halves of a model that has two take the same."""
    given, layout = tokens(), input_layout(skeleton)
    windows = TokenWindows(
        tokens=given,
        lengths=np.full(1, given.shape[1], np.int32),
        fingerprint="",
        num_documents=0,
        decoder_start=(0,) if layout.takes_two_texts else (),
    )
    batch = layout.batch(windows, slice(None), 1)
    if layout.takes_two_texts:
        same = {name: given for name in batch.arrays if name.endswith("token_ids")}
        masks = {name: np.ones_like(given) for name in batch.arrays if name.endswith("mask")}
        mask = np.ones_like(given, bool)
        batch = replace(batch, arrays={**same, **masks}, tokens=given, mask=mask, other_mask=mask)
    return batch


def relative(found: Any, name: str) -> float:
    """The largest difference from what transformers answers, by the largest answer."""
    output = found["sequence_output"] if isinstance(found, dict) else found
    expected = stored_answer(name)
    return float(np.abs(sampled(np.asarray(output)) - expected).max() / np.abs(expected).max())


@pytest.mark.filterwarnings(
    "ignore:(?s).*using a softmax over axis:UserWarning"
)  # Gemma 4's encoder
@pytest.mark.parametrize(
    "name",
    cases(
        ["llama with a large epsilon", "xlm-roberta"],
        {*CASES} - {*MORE},
        MORE,
    ),
)
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
    model = skeleton.task if skeleton.predicts_tokens else skeleton.backbone
    given = asked(skeleton).arrays
    taken = {key: given[key] for key in skeleton.backbone.input}
    found = jax.jit(lambda: model(taken))()  # in one compilation
    assert relative(found, name) < TOLERANCES.get(name, 3e-5)


@pytest.mark.filterwarnings("ignore:(?s).*using a softmax over axis:UserWarning")
@pytest.mark.parametrize(
    "name", cases([], EIGHT_BITS, sorted({*CASES} - {*EIGHT_BITS} - NOT_ROUNDED))
)
def test_what_is_quantized_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """The same after quantization, as near as eight bits are."""
    wanted = recipe(Int8Scheme()).model_copy(update={"allow_partial": True})
    run = finished_run(folder_of(name, tmp_path / "source"), wanted, tmp_path / "run")
    found = answer_to(artifact_model(run.model, run.store), asked(run.model.skeleton))
    output = found["sequence_output"] if isinstance(found, dict) else found
    expected = stored_answer(name)
    error = sampled(np.asarray(output, "float64")) - expected
    assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(expected) < ROUNDED

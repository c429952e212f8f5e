"""A model that runs part by part gives the output of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import keras_hub
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DamagedObjectError
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.worker.model_state import ModelState
from pipeline.worker.streamed_model import StreamedModel, artifact_model, source_model
from quantizer.schemes import Int8Scheme
from tests.integration.quantized import SCHEMES, answer, batch_of, distance, finished_run, recipe
from tests.pipeline.presets import (
    example_inputs,
    shared_preset,
    stock_task,
)
from tests.selection import by_default

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

RECIPE = Recipe(name="int8", scheme=Int8Scheme())


def state_of(source: Path) -> ModelState:
    plan = make_plan(read_preset(str(source)), RECIPE, threads=1).plan
    return ModelState(plan, str(source))


@pytest.mark.parametrize(
    "architecture", by_default(["Bert", "Falcon", "Gemma3", "Llama3", "OPT"], ["Bert"])
)
def test_a_streamed_source_gives_the_output_of_stock_kerashub(architecture: str) -> None:
    task = stock_task(architecture)
    inputs = example_inputs(task)
    tokens, mask = inputs["token_ids"], inputs["padding_mask"].astype(bool)
    if "mask_positions" in inputs:
        inputs["mask_positions"] = np.tile(np.arange(tokens.shape[1], dtype="int32"), (2, 1))
    expected = np.asarray(task(inputs))
    found = answer(source_model(state_of(shared_preset(architecture))), tokens, mask)
    assert distance(np.asarray(found)[mask], expected[mask]) < 1e-5


def test_a_bfloat16_source_stays_bfloat16() -> None:
    model = source_model(state_of(shared_preset("Llama3", dtype="bfloat16")))
    tokens = np.arange(5, 17, dtype="int32").reshape(1, 12)
    assert str(answer(model, tokens).dtype) == "bfloat16"


@pytest.mark.parametrize("architecture", by_default(["Bert", "GPT2", "Gemma3", "Llama3"], []))
def test_float16_is_evaluated_bit_for_bit_as_stock_keras_runs_it(
    architecture: str, tmp_path: Path
) -> None:
    source = shared_preset(architecture, dtype="float16")
    run = finished_run(source, recipe(SCHEMES["int4"]), tmp_path)
    stock = getattr(keras_hub.models, run.plan.task).from_preset(str(run.artifact))
    inputs = example_inputs(stock)
    tokens, mask = inputs["token_ids"], inputs["padding_mask"].astype(bool)
    if "mask_positions" in inputs:
        inputs["mask_positions"] = np.tile(np.arange(tokens.shape[1], dtype="int32"), (2, 1))
    found = answer(artifact_model(run.model, run.store), tokens, mask)
    expected = np.asarray(stock(inputs))
    assert found.dtype == expected.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(found)[mask], expected[mask])


def test_a_part_is_read_when_it_is_due_and_not_before() -> None:
    reads: list[int] = []
    model = counting(source_model(state_of(shared_preset("Llama3", num_blocks=3))), reads)
    tokens = np.arange(5, 17, dtype="int32").reshape(1, 12)
    states = model.embed([batch_of(model, tokens)] * 2)
    assert reads == [0]
    for block in range(3):
        model.advance(block, states)
        assert reads == [0, *range(1, block + 2)]
        # What passes the blocks stays on the device.
        assert all(isinstance(value, jax.Array) for state in states for value in state.values())
    model.head()
    assert reads == [0, 1, 2, 3, 0]


def test_an_artifact_is_run_from_its_own_files(tmp_path: Path) -> None:
    run = finished_run(shared_preset("Llama3"), RECIPE, tmp_path)
    tokens = np.arange(5, 17, dtype="int32").reshape(1, 12)
    found = answer(artifact_model(run.model, run.store), tokens)
    assert 0 < distance(found, answer(source_model(run.model), tokens)) < 0.1
    (run.artifact / "model_00002.weights.h5").unlink()
    model = artifact_model(run.model, run.store)
    states = model.embed([batch_of(model, tokens)])
    model.advance(0, states)
    with pytest.raises(DamagedObjectError, match="part 2 is no longer committed"):
        model.advance(1, states)


def counting(model: StreamedModel, reads: list[int]) -> StreamedModel:
    read = model._read

    def counted(part: int) -> Any:
        reads.append(part)
        return read(part)

    return StreamedModel(model.graph, counted, compute_dtype="float32")


@pytest.mark.parametrize("scheme", by_default(["awq", "float8", "gptq8", "int4", "int8"], []))
def test_a_perplexity_is_that_of_stock_keras_on_the_same_tokens(
    scheme: str, tmp_path: Path
) -> None:
    """The tables of tokens are the head too, which rounds what it is given, as in the recipes that
    come with the package: where the blocks do not, a last bit may move single logits."""
    source = shared_preset("Llama3", num_blocks=3)
    tables = SCHEMES["int4"] if scheme == "int4" else Int8Scheme()
    run = finished_run(source, recipe(SCHEMES[scheme], embeddings=tables), tmp_path)
    tokens = np.random.default_rng(3).integers(5, 250, (4, 64), dtype="int32")
    stock = keras_hub.models.CausalLM.from_preset(str(run.artifact))
    expected = np.asarray(
        stock({"token_ids": tokens, "padding_mask": np.ones(tokens.shape, "bool")})
    )
    found = np.asarray(answer(artifact_model(run.model, run.store), tokens))
    if scheme in ("float8", "int8"):  # they round inputs, so that nothing but equality is close
        np.testing.assert_array_equal(found, expected)
    assert perplexity(found, tokens) == pytest.approx(perplexity(expected, tokens), rel=1e-4)


def perplexity(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> float:
    logits = logits.astype(np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()))

"""From a real Hugging Face directory to a preset that stock KerasHub gives strings to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import keras_hub
import numpy as np
import pytest

from pipeline.recipe.recipe import Calibration, Recipe
from quantizer.schemes import Float8Scheme, GPTQScheme, Int8Scheme, Scheme
from tests.benchmarks.minilm import preset_folder
from tests.integration.quantized import finished_run
from tests.integration.stock_session import StockSession, assert_same, stock_session
from tests.models.smollm2_huggingface import smollm2_directory
from tests.models.texts import evaluation_documents, write_texts

# Of the real models; test_source and test_converted_files convert tiny ones by default.
pytestmark = pytest.mark.exhaustive

# The least cosine between a sentence's vectors, of the float model and the quantized one.
FIDELITY: dict[str, tuple[Scheme, float]] = {
    "int8": (Int8Scheme(), 0.995),
    "gptq4": (GPTQScheme(group_size=64, activation_order=True, refinement_sweeps=2), 0.97),
    "float8": (Float8Scheme(), 0.99),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSession]:
    with stock_session(tmp_path_factory.mktemp("stock")) as session:
        yield session


def recipe_on_texts(scheme: Scheme, folder: Path, num_samples: int) -> Recipe:
    texts, _ = write_texts(folder)
    calibration = Calibration(texts=(str(texts),), num_samples=num_samples, sequence_length=128)
    return Recipe(name="test", scheme=scheme, calibration=calibration)


@pytest.mark.parametrize("scheme", FIDELITY)
def test_a_real_encoder_embeds_strings_as_the_float_model_does(
    scheme: str, stock: StockSession, tmp_path: Path
) -> None:
    wanted, least = FIDELITY[scheme]
    sentences = [document[:300] for document in evaluation_documents()[:8]]
    run = finished_run(
        preset_folder(), recipe_on_texts(wanted, tmp_path / "texts", 32), tmp_path / "run"
    )
    stock.ask_to_embed(preset_folder(), sentences, task="TextEmbedder")
    before = stock.answer().output
    stock.ask_to_embed(run.artifact, sentences)
    after = stock.answer()
    assert set(after.quantized.values()) == {wanted.mode}
    assert np.allclose(np.linalg.norm(after.output, axis=1), 1, atol=1e-3)
    cosines = np.sum(before * after.output, axis=1)
    print(f"{scheme}: cosine to the float model {cosines.mean():.4f}, at least {cosines.min():.4f}")
    assert cosines.min() > least
    # The float model tells the sentences apart: its vectors are not all alike.
    assert (before @ before.T).min() < 0.5


def test_a_real_encoder_answers_as_the_pipeline_does(stock: StockSession, tmp_path: Path) -> None:
    run = finished_run(preset_folder(), Recipe(name="int8", scheme=Int8Scheme()), tmp_path)
    assert_same(run, stock)


def test_a_real_llama_answers_as_the_pipeline_does(stock: StockSession, tmp_path: Path) -> None:
    source = smollm2_directory(tmp_path / "smollm2", num_blocks=2)
    wanted = recipe_on_texts(GPTQScheme(group_size=64), tmp_path / "texts", 16)
    run = finished_run(source, wanted, tmp_path / "run")
    assert_same(run, stock)
    task = keras_hub.models.CausalLM.from_preset(str(run.artifact))
    prompt = "The capital of France is"
    assert task.generate(prompt, max_length=12).startswith(prompt)

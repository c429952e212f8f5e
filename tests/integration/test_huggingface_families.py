"""Tiny Hugging Face folders of every family that KerasHub converts, from config.json to stock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.weights.source import open_source
from pipeline.worker.streamed_model import artifact_model
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme
from tests.integration.quantized import answer, distance, finished_run, recipe
from tests.integration.stock_session import (
    StockSession,
    assert_same,
    some_tokens,
    stock_session,
)
from tests.models.tiny_huggingface import CONFIGS, tiny_huggingface
from tests.selection import by_default

pytestmark = [
    # KerasHub leaves files of vocabularies open.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # Keras, of Gemma 4's encoder where there is no image.
    pytest.mark.filterwarnings("ignore:(?s).*using a softmax over axis:UserWarning"),
]

TASKS = {
    "albert": "AlbertMaskedLM",
    "bart": "BartSeq2SeqLM",
    "bert": "BertTextEmbedder",
    "distilbert": "DistilBertMaskedLM",
    "gemma3": "Gemma3CausalLM",
    "gemma3_text": "Gemma3CausalLM",
    "gemma4": "Gemma4CausalLM",
    "mistral": "MistralCausalLM",
    "paligemma": "PaliGemmaCausalLM",
    "qwen3_5": "Qwen3_5CausalLM",
    "roberta": "RobertaMaskedLM",
    "xlm-roberta": "XLMRobertaTextEmbedder",
}
WITH_TOKENIZER = {
    "bart",
    "bert",
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "mistral",
    "paligemma",
}
CALIBRATED = ("gemma3_text", "mistral", "paligemma")
ENCODERS_ALONE = ("albert", "distilbert", "roberta")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSession]:
    with stock_session(tmp_path_factory.mktemp("stock")) as session:
        yield session


def folder_of(family: str, path: Path, **changes: Any) -> Path:
    extra = {}
    if family == "roberta":  # zeros, as in every published one
        extra["roberta.embeddings.token_type_embeddings.weight"] = np.zeros((1, 32), np.float32)
    known = family in WITH_TOKENIZER
    return tiny_huggingface(path, family, tokenizer=known, extra=extra, **changes)


@pytest.mark.parametrize(
    "family",
    [
        *by_default(sorted({*CONFIGS} - {*ENCODERS_ALONE, "qwen3_5"}), []),
        pytest.param("qwen3_5", marks=pytest.mark.slow),  # its linear attention compiles slowly
    ],
)
def test_stock_keras_answers_the_same(family: str, stock: StockSession, tmp_path: Path) -> None:
    # Mistral as it is published, since its converter casts to float16.
    dtype = "bfloat16" if family == "mistral" else "float32"
    source = folder_of(family, tmp_path / "source", torch_dtype=dtype)
    scheme = GPTQScheme(group_size=8) if family in CALIBRATED else Int8Scheme()
    wanted = recipe(scheme)
    if family == "gemma4":  # KerasHub's blocks read most kernels past their layers
        wanted = wanted.model_copy(update={"allow_partial": True})
    run = finished_run(source, wanted, tmp_path / "run")
    assert run.plan.task == TASKS.get(family, run.plan.task)
    assert run.plan.notes == () or family in ("gemma3", "gemma3_text")
    assert_same(run, stock, tolerance=0.05 if dtype == "bfloat16" else 1e-3)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("gemma3", GPTQScheme(group_size=8)),
        ("gemma3", Int8Scheme()),
        ("paligemma", Int8Scheme()),
    ],
)
@pytest.mark.exhaustive
def test_models_with_images_are_quantized_in_their_own_dtype(
    family: str, scheme: Scheme, stock: StockSession, tmp_path: Path
) -> None:
    source = folder_of(family, tmp_path / "source", torch_dtype="bfloat16")
    run = finished_run(source, recipe(scheme), tmp_path / "run")
    cast = "39 variables are cast from bfloat16 to float32"  # those of Gemma 3's encoder
    assert (cast in run.plan.notes) == (family == "gemma3")
    assert_same(run, stock, tolerance=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the head has no weights
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ENCODERS_ALONE)
def test_stock_keras_encodes_the_same(family: str, tmp_path: Path) -> None:
    """KerasHub has no task for these that does without a head, and no weights for the head."""
    source = folder_of(family, tmp_path / "source", torch_dtype="float32")
    run = finished_run(source, recipe(Int8Scheme()), tmp_path / "run")
    assert run.plan.task == TASKS[family]
    assert len(run.plan.notes) == 1
    tokens = some_tokens(run)
    backbone = getattr(keras_hub.models, TASKS[family]).from_preset(str(run.artifact)).backbone
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    inputs["segment_ids"] = np.zeros_like(tokens)
    found = backbone({name: inputs[name] for name in backbone.input})
    expected = answer(artifact_model(run.model, run.store), tokens)
    for name in expected if isinstance(expected, dict) else [None]:
        pair = (found, expected) if name is None else (found[name], expected[name])
        assert distance(*pair) <= 1e-3


@pytest.mark.parametrize("family", ["distilbert", "gemma3", "gemma3_text"])
def test_what_the_result_will_be_is_planned(family: str, tmp_path: Path) -> None:
    source = folder_of(family, tmp_path, torch_dtype="float32")
    plan = make_plan(read_preset(str(source)), recipe(Int8Scheme()), threads=1).plan
    assert plan.task == TASKS[family]
    [note] = plan.notes
    expected = {
        "distilbert": "a head of its own would have no weights",
        "gemma3": "TensorFlow",
        "gemma3_text": "TensorFlow",
    }
    assert expected[family] in note


def test_float16_without_int8_layers_says_what_to_choose(tmp_path: Path) -> None:
    source = read_preset(str(tiny_huggingface(tmp_path, "llama", torch_dtype="float16")))
    wanted = Recipe(name="int8", scheme=Int8Scheme())
    with pytest.raises(PipelineError, match="--dtype bfloat16 or float32"):
        make_plan(source, wanted, threads=1)
    plan = make_plan(source, wanted.model_copy(update={"dtype": "bfloat16"}), threads=1).plan
    assert plan.recipe.dtype == "bfloat16"
    assert set(plan.policies.values()) == {"int8"}
    # The source is still itself, so a run of it can be resumed.
    assert plan.source_files_sha256 == open_source(source.in_dtype("float32")).files_digest()
    assert plan.notes == ("21 variables are cast from float32 to bfloat16",)


@pytest.mark.exhaustive
def test_a_classifier_keeps_its_head_in_a_preset(tmp_path: Path) -> None:
    """As docs/reference.md says."""
    rng = np.random.default_rng(0)
    shapes = {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    head = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    folder = tiny_huggingface(tmp_path / "in", "bert", extra=head, torch_dtype="float32")
    task_class: Any = keras_hub.models.TextClassifier
    task = task_class.from_preset(str(folder), num_classes=3, preprocessor=None)
    task.output_dense.kernel.assign(head["classifier.weight"].T)
    task.output_dense.bias.assign(head["classifier.bias"])
    task.save_to_preset(str(tmp_path / "preset"))
    run = finished_run(tmp_path / "preset", recipe(Int8Scheme()), tmp_path / "run")
    assert run.plan.task == "BertTextClassifier"
    quantized = task_class.from_preset(str(run.artifact))
    for kept, source in zip(quantized.output_dense.weights, task.output_dense.weights, strict=True):
        assert np.array_equal(kept, source)
    tokens = some_tokens(run)
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    inputs["segment_ids"] = np.zeros_like(tokens)
    assert distance(quantized(inputs), task(inputs)) < 0.1

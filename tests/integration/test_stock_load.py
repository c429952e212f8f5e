"""Stock KerasHub, in a process without quantfleet, answers what the pipeline itself computes.

By default two runs are loaded: one that has all modes and quantized embeddings, and one of the
architecture with the hardest kernels. `make test-all` loads every architecture and every scheme
once. All combinations of the two:

    .venv/bin/pytest -m slow tests/integration/test_stock_load.py

Except by default, stock Keras loads each run on PyTorch too, where PyTorch is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.recipe.recipe import Recipe, Rule
from quantizer.schemes import Int4Scheme, Int8Scheme, Scheme
from tests.integration.quantized import GROUP_SIZE, SCHEMES, finished_run, recipe
from tests.integration.stock_session import StockSession, assert_same, stock_session
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import shared_preset

# KerasHub's own, in its SentencePiece tokenizers.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

# One computation, compiled twice. In bfloat16 even stock Keras' own answers, compiled and not,
# are 3e-2 apart when inputs are quantized on the way.
TOLERANCE = {"float32": 1e-4, "bfloat16": 8e-2}

EVERYTHING = [(architecture, scheme) for architecture in ARCHITECTURES for scheme in SCHEMES]
COVERING = [
    (architecture, scheme)
    for architecture, scheme in EVERYTHING
    if scheme == "gptq4" or architecture == "Llama3" or (architecture, scheme) == ("Bert", "int8")
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSession]:
    with stock_session(tmp_path_factory.mktemp("stock")) as session:
        yield session


@pytest.fixture(scope="module")
def stock_on_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSession]:
    with stock_session(tmp_path_factory.mktemp("stock"), "torch") as session:
        yield session


@pytest.fixture
def all_stock(stock: StockSession, request: pytest.FixtureRequest) -> list[StockSession]:
    """Stock Keras on every installed backend."""
    if importlib.util.find_spec("torch") is None:
        return [stock]
    on_torch: StockSession = request.getfixturevalue("stock_on_torch")
    return [stock, on_torch]


def test_stock_answers_the_same(stock: StockSession, tmp_path: Path) -> None:
    """Gemma: each head of its queries is solved on its own, and embeddings are scaled."""
    run = finished_run(shared_preset("Gemma"), recipe(SCHEMES["gptq4"]), tmp_path)
    assert_same(run, stock)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("architecture", "scheme"), COVERING)
def test_stock_answers_the_same_for_every_architecture_and_for_every_scheme(
    architecture: str, scheme: str, all_stock: list[StockSession], tmp_path: Path
) -> None:
    source = shared_preset(architecture)
    assert_same(finished_run(source, recipe(SCHEMES[scheme]), tmp_path), *all_stock)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "scheme"), [case for case in EVERYTHING if case not in COVERING]
)
def test_stock_answers_the_same_for_every_architecture_with_every_scheme(
    architecture: str, scheme: str, all_stock: list[StockSession], tmp_path: Path
) -> None:
    source = shared_preset(architecture)
    assert_same(finished_run(source, recipe(SCHEMES[scheme]), tmp_path), *all_stock)


# Architecture, tied, dtype, scheme of the kernels, scheme of the embeddings.
HALVES_AND_HEADS: list[tuple[str, bool, str, str, Scheme | None]] = [
    ("Llama3", False, "bfloat16", "int8", Int8Scheme()),
    ("Qwen3", True, "float32", "int4", Int4Scheme(block_size=-1)),
    ("Llama3", True, "bfloat16", "int4", None),
    ("Llama3", True, "float32", "int8", Int8Scheme()),
    ("Llama3", False, "float32", "int8", Int4Scheme(block_size=GROUP_SIZE)),
    ("Bert", True, "float32", "int8", Int8Scheme()),
    ("GPT2", True, "float32", "int8", Int8Scheme()),
    ("Gemma", True, "bfloat16", "int8", Int8Scheme()),
    ("Mistral", True, "bfloat16", "gptq4", Int4Scheme(block_size=GROUP_SIZE)),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("architecture", "tied", "dtype", "scheme", "embeddings"), HALVES_AND_HEADS
)
def test_stock_answers_the_same_in_halves_and_with_quantized_embeddings(
    architecture: str,
    tied: bool,
    dtype: str,
    scheme: str,
    embeddings: Scheme | None,
    stock: StockSession,
    tmp_path: Path,
) -> None:
    source = shared_preset(architecture, dtype=dtype, tied=tied)
    run = finished_run(source, recipe(SCHEMES[scheme], embeddings=embeddings), tmp_path)
    tables = [layer for layer in run.plan.parts[0].layers if layer.kind == "embedding"]
    assert tables
    assert all((table.scheme is not None) == (embeddings is not None) for table in tables)
    assert_same(run, stock, tolerance=TOLERANCE[dtype])


@pytest.mark.torch
@pytest.mark.parametrize("scheme", ["gptq4", "int4"])
def test_stock_on_torch_answers_the_same_in_float16(
    scheme: str, stock_on_torch: StockSession, tmp_path: Path
) -> None:
    """JAX has no float16 attention on a CPU: here the pipeline computes in float32."""
    run = finished_run(shared_preset("Llama3", dtype="float16"), recipe(SCHEMES[scheme]), tmp_path)
    assert_same(run, stock_on_torch, tolerance=5e-3)


@pytest.mark.exhaustive
def test_stock_answers_the_same_where_schemes_are_mixed(
    stock: StockSession, tmp_path: Path
) -> None:
    """All modes in one run: query and key share an input, but not a scheme; value stays float."""
    rules = (
        Rule(pattern="query$", scheme=SCHEMES["gptq8"]),
        Rule(pattern="key$", scheme=SCHEMES["float8"]),
        Rule(pattern="value$", scheme=None),
        Rule(pattern="attention_output$", scheme=SCHEMES["awq"]),
        Rule(pattern="layer_1/feedforward_gate", scheme=SCHEMES["int4"]),
        Rule(pattern="feedforward_intermediate", scheme=SCHEMES["int8"]),
    )
    wanted = recipe(SCHEMES["gptq3"], *rules, embeddings=Int8Scheme())
    run = finished_run(shared_preset("Llama3"), wanted, tmp_path)
    mode_of = {
        path: None if layer.scheme is None else layer.scheme.mode
        for path, layer in run.layers().items()
        if path.startswith("transformer_layer_1/")
    }
    assert sorted(map(str, mode_of.values())) == [
        "None",
        "awq",
        "float8",
        "gptq",
        "gptq",
        "int4",
        "int8",
    ]
    assert_same(run, stock)


@pytest.mark.exhaustive
def test_layers_left_out_are_those_of_the_source(stock: StockSession, tmp_path: Path) -> None:
    rules = (Rule(pattern="layer_0/|attention", scheme=None),)
    run = finished_run(shared_preset("Llama3"), recipe(SCHEMES["int8"], *rules), tmp_path)
    quantized = [path for path, layer in run.layers().items() if layer.scheme is not None]
    assert len(quantized) == 3
    assert all("layer_1/feedforward" in path for path in quantized)
    assert_same(run, stock)


def test_layers_that_stay_in_float_say_why_in_the_record(tmp_path: Path) -> None:
    wanted = recipe(SCHEMES["int8"], embeddings=SCHEMES["int8"])
    run = finished_run(shared_preset("Bert"), wanted, tmp_path)
    left = {path: layer.note for path, layer in run.layers().items() if layer.scheme is None}
    assert left == {
        "mlm_head/intermediate_dense": "part of the task, not of the backbone; left in float",
        "position_embedding": "stock Keras cannot load a PositionEmbedding quantized",
    }


@pytest.mark.parametrize(
    ("dtype", "wanted", "reason"),
    [
        ("float16", recipe(Int8Scheme()), "Keras refuses 'int8' on 'float16'"),
        ("float16", recipe(None, embeddings=Int8Scheme()), "Keras refuses 'int8' on 'float16'"),
        ("float32", recipe(Int8Scheme(quantize_activations=False)), "int8 weights alone"),
    ],
)
def test_what_stock_keras_has_no_policy_for_is_refused_before_anything_is_written(
    dtype: str, wanted: Recipe, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=reason) as refused:
        finished_run(shared_preset("Llama3", dtype=dtype), wanted, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()

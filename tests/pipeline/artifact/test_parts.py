"""What we write, stock KerasHub loads, and answers as it should."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from pipeline.artifact.parts import (
    Part,
    cut_parts,
    decode_part,
    encode_part,
    weights_index,
)
from pipeline.artifact.verification import ask_stock
from pipeline.errors import ArtifactError, WeightsFileError
from pipeline.model.preset import INDEX_FILE, read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.model.weight_layout import weight_layout
from quantizer import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme
from tests.models.tiny import tiny_preset
from tests.pipeline import artifacts

# KerasHub leaves a tokenizer's file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

FORMATS = (
    # Without the searches, which compile longest and change no format.
    GPTQScheme(weight_bits=3, group_size=16, scale_search=False),
    GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    AWQScheme(group_size=16, num_grid_points=2, clip_search=False),
    Int4Scheme(block_size=16),
    Int4Scheme(block_size=-1),
)
"""One of each way to store a kernel whose inputs stay as they are."""
WEIGHT_ONLY = (
    *FORMATS,
    *(GPTQScheme(weight_bits=bits, group_size=16) for bits in (2, 3, 4, 8)),
    GPTQScheme(group_size=-1, activation_order=True),
    AWQScheme(group_size=-1),
)
# Largest relative weight error by bits; a misplaced code makes it about 1.
FAITHFUL = {2: 0.7, 3: 0.4, 4: 0.2, 8: 0.05}


def relative(answer, expected):
    return np.abs(answer - expected).max() / np.abs(expected).max()


def mixed(source, schemes, *, every=1):
    """Each scheme in turn, over every n-th kernel."""
    paths = artifacts.kernel_paths(source)[::every]
    return dict(zip(paths, itertools.cycle(schemes), strict=False))


def dequantize(source, target, schemes, dtype="float32"):
    """The float model with the weights that an artifact's codes stand for."""
    restored = artifacts.load(source, dtype)
    errors = artifacts.restore(restored, artifacts.load(target))
    assert set(errors) == set(schemes) - {"token_embedding"}
    for path, error in errors.items():
        bits = 8 if "8" in schemes[path].mode else getattr(schemes[path], "weight_bits", 4)
        assert 0 < error < FAITHFUL[bits], (path, schemes[path])
    return restored


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny_preset("Llama3", folder, num_blocks=1, intermediate_dim=64)


@pytest.mark.exhaustive  # test_stock_load compares finished runs
def test_stock_kerashub_answers_as_the_dequantized_float_model(llama, tmp_path):
    formats = mixed(llama, FORMATS)
    artifacts.write(llama, tmp_path / "weights", formats)
    restored = dequantize(llama, tmp_path / "weights", formats)
    rounded = mixed(llama, (Int8Scheme(), Float8Scheme()), every=3)
    rounded["token_embedding"] = Int8Scheme()
    artifacts.write(llama, tmp_path / "activations", rounded)
    tokens = artifacts.some_tokens(restored)
    first, second = ask_stock(
        [tmp_path / "weights", tmp_path / "activations"], [tokens] * 2
    ).outputs
    expected = artifacts.run(restored, tokens)
    assert relative(first, expected) < 1e-4
    # Rounded activations leave no more than a likeness; the slow test compares closely.
    assert relative(second, artifacts.run(artifacts.load(llama, "float32"), tokens)) < 0.2


FAMILIES = {
    "Llama3": {},
    "Llama3 in bfloat16, untied": {"dtype": "bfloat16", "tied": False},
    "Bert": {},
    "GPT2": {},
    "Gemma": {},
    "Gemma in bfloat16": {"dtype": "bfloat16"},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def family_preset(name, folder):
    options = {"dtype": "float32", "intermediate_dim": 64, **FAMILIES[name]}
    return tiny_preset(name.partition(" ")[0], folder, **options), options["dtype"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family",
    [
        # Its layers in bfloat16 lie as these do.
        pytest.param(name, marks=pytest.mark.slow if name == "Gemma" else ())
        for name in FAMILIES
    ],
)
def test_every_family_holds_every_weight_only_scheme(family, tmp_path):
    source, dtype = family_preset(family, tmp_path / "source")
    schemes = mixed(source, WEIGHT_ONLY)
    artifacts.write(source, tmp_path / "q", schemes)
    restored = dequantize(source, tmp_path / "q", schemes, dtype)
    tokens = artifacts.some_tokens(restored)
    [answer] = ask_stock([tmp_path / "q"], [tokens]).outputs
    assert relative(answer, artifacts.run(restored, tokens)) < TOLERANCE[dtype]


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", [Int8Scheme(), Int4Scheme(block_size=16)])
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "GPT2" else pytest.mark.slow) for name in FAMILIES],
)
def test_every_family_rounds_activations_and_tables_as_layers_quantized_in_place(
    family, table, tmp_path
):
    source, dtype = family_preset(family, tmp_path / "source")
    schemes = mixed(source, (Int8Scheme(), Float8Scheme(power_of_two=True)))
    schemes["token_embedding"] = table
    artifacts.write(source, tmp_path / "q", schemes)
    in_place = artifacts.quantize_in_place(artifacts.load(source, dtype), schemes)
    tokens = artifacts.some_tokens(in_place)
    [answer] = ask_stock([tmp_path / "q"], [tokens]).outputs
    assert relative(answer, artifacts.run(in_place, tokens)) < TOLERANCE[dtype]


@pytest.mark.torch
def test_torch_reads_what_jax_reads(llama, tmp_path):
    artifacts.write(llama, tmp_path / "q", mixed(llama, FORMATS))
    tokens = artifacts.some_tokens(artifacts.load(tmp_path / "q"))
    [jax_answer] = ask_stock([tmp_path / "q"], [tokens]).outputs
    answer = ask_stock([tmp_path / "q"], [tokens], backend="torch")
    assert answer.backend == "torch"
    assert relative(answer.outputs[0], jax_answer) < 1e-4


@pytest.fixture(scope="module")
def encoded(llama):
    """Cheap to solve: everything is rounded to nearest."""
    return artifacts.encode(llama, mixed(llama, (Int4Scheme(block_size=16),)))


def test_parts_hold_every_variable_once_and_a_block_nothing_of_another(llama):
    two = tiny_preset("Llama3", llama.parent / "two", num_blocks=2)
    backbone = build_skeleton(read_preset(str(two))).backbone
    layout = weight_layout(backbone)
    rest, *blocks = cut_parts(layout, artifacts.blocks(backbone))
    assert sorted(v.key for p in (rest, *blocks) for v in p.variables) == sorted(
        v.key for v in layout
    )
    assert {v.layer_path for v in rest.variables} == {
        "token_embedding",
        "sequence_output_layernorm",
    }
    for index, part in enumerate(blocks):
        assert part.file == f"model_{index + 1:05d}.weights.h5"
        paths = {v.layer_path.partition("/")[0] for v in part.variables}
        assert paths == {f"transformer_layer_{index}"}


def test_index_sends_each_layer_to_the_file_that_has_it(encoded):
    index = json.loads(encoded.files[INDEX_FILE])
    for part in encoded.parts:
        values = decode_part(part, encoded.files[part.file])
        groups = {f"/{variable.h5_group}" for variable in part.variables}
        assert {g for g, file in index["weight_map"].items() if file == part.file} == groups
        assert set(values) == {variable.name_path for variable in part.variables}
    assert index["metadata"]["total_size"] == sum(part.num_bytes for part in encoded.parts)


def test_what_is_decoded_encodes_to_the_same_bytes(encoded):
    for part in encoded.parts:
        data = encoded.files[part.file]
        assert encode_part(part, decode_part(part, data)) == data


def test_a_variable_too_few_too_many_or_misshapen_is_refused(encoded):
    part = encoded.parts[1]
    values = decode_part(part, encoded.files[part.file])
    place = sorted(values)[0]
    for wrong, message in (
        ({p: v for p, v in values.items() if p != place}, "no value for"),
        (values | {"layers/other/kernel": values[place]}, "no variable of this file"),
        (values | {place: values[place][:-1]}, "where Keras reads"),
        (values | {place: values[place].astype("float64")}, "where Keras reads"),
    ):
        with pytest.raises(ArtifactError, match=message):
            encode_part(part, wrong)


def test_the_file_of_another_part_is_refused(encoded):
    rest, block = encoded.parts
    with pytest.raises(WeightsFileError, match="not of this model"):
        decode_part(block, encoded.files[rest.file])
    smaller = dataclasses.replace(rest, variables=rest.variables[:-1])
    with pytest.raises(WeightsFileError, match="not of this model"):
        decode_part(smaller, encoded.files[rest.file])


def test_solved_variables_that_the_policy_has_no_place_for_are_refused(encoded):
    part = encoded.parts[1]
    path = part.variables[0].layer_path
    with pytest.raises(ArtifactError, match=r"no variable 'awq_scales'.*policy"):
        part.layer_values(path, {"awq_scales": np.ones(4, "float32")})


def test_index_depends_on_the_layout_alone(encoded):
    assert weights_index(list(encoded.parts)) == encoded.files[INDEX_FILE]
    assert isinstance(encoded.parts[0], Part)

"""What we write, stock KerasHub loads, and answers as it should."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from pipeline.artifact import INDEX_FILE, Part, cut_parts, decode_part, encode_part, weights_index
from pipeline.errors import ArtifactError, ShardError
from pipeline.skeleton import build_skeleton, read_preset
from pipeline.stock_load import ask_stock
from pipeline.weight_layout import weight_layout
from quantizer import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme
from tests.models.tiny import tiny_preset
from tests.pipeline import artifacts

WEIGHT_ONLY = (
    *(GPTQScheme(weight_bits=bits, group_size=16) for bits in (2, 3, 4, 8)),
    GPTQScheme(group_size=-1, activation_order=True),
    AWQScheme(group_size=16),
    Int4Scheme(block_size=16),
    Int4Scheme(block_size=-1),
)
# Largest relative weight error: a misplaced code gives about 1.
FAITHFUL = {2: 0.7, 3: 0.4, 4: 0.2, 8: 0.02}


def scheme_bits(scheme):
    return getattr(scheme, "weight_bits", 4)


def relative(answer, expected):
    return np.abs(answer - expected).max() / np.abs(expected).max()


def mixed(source, schemes, *, every=1):
    """Each scheme in turn, over every n-th kernel."""
    return dict(zip(artifacts.kernel_paths(source)[::every], itertools.cycle(schemes)))


def check_weight_only(source, target, schemes, dtype, tolerance):
    artifacts.write(source, target, schemes)
    restored, quantized = artifacts.load(source, dtype), artifacts.load(target)
    errors = artifacts.restore(restored, quantized)
    assert set(errors) == set(schemes)
    for path, error in errors.items():
        assert 0 < error < FAITHFUL[scheme_bits(schemes[path])], (path, schemes[path])
    tokens = artifacts.some_tokens(restored)
    [answer] = ask_stock([target], [tokens]).outputs
    assert relative(answer, artifacts.run(restored, tokens)) < tolerance


def check_with_activations(source, target, schemes, dtype, tolerance):
    artifacts.write(source, target, schemes)
    in_place = artifacts.quantize_in_place(artifacts.load(source, dtype), schemes)
    tokens = artifacts.some_tokens(in_place)
    [answer] = ask_stock([target], [tokens]).outputs
    assert relative(answer, artifacts.run(in_place, tokens)) < tolerance


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_preset("Llama3", tmp_path_factory.mktemp("llama"))


def test_stock_answers_with_weights_only_are_those_of_the_dequantized_float_model(llama, tmp_path):
    # Blocks have seven kernels: eight schemes meet each of them somewhere.
    schemes = mixed(llama, WEIGHT_ONLY)
    check_weight_only(llama, tmp_path / "q", schemes, "float32", 1e-4)


def test_stock_answers_with_activations_are_those_of_layers_quantized_in_place(llama, tmp_path):
    schemes = mixed(llama, (Int8Scheme(), Float8Scheme()), every=3)
    schemes["token_embedding"] = Int8Scheme()
    check_with_activations(llama, tmp_path / "q", schemes, "float32", 1e-5)

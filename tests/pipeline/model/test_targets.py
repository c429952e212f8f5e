"""What a target tells of its layer, and what reaches the layer in a call."""

import keras
import numpy as np
import pytest

from pipeline.model.targets import call_with, find_targets, recorded_inputs


def target_of(layer, *shape):
    layer.build(shape)
    [target] = find_targets([layer], embeddings=True)
    return target


def test_kernels_are_measured_by_what_they_multiply():
    dense = target_of(keras.layers.Dense(3), None, 4)
    assert (dense.layer_kind, dense.in_features, dense.out_features) == ("kernel", 4, 3)
    assert dense.kernel_path == dense.layer.kernel.path
    heads = keras.layers.EinsumDense("btd,ndh->btnh", output_shape=(None, 2, 5))
    query = target_of(heads, None, 7, 6)
    assert (query.layer_kind, query.in_features, query.out_features) == ("kernel", 6, 10)


def test_embeddings_have_one_table_or_two():
    table = target_of(keras.layers.Embedding(9, 4), None, 7)
    assert (table.layer_kind, table.in_features, table.out_features) == ("embedding", 4, 9)
    assert table.table_path == table.layer.embeddings.path
    assert table.reverse_table_path is None
    tied = target_of(keras.layers.ReversibleEmbedding(9, 4), None, 7)
    assert tied.reverse_table_path is None
    untied = target_of(keras.layers.ReversibleEmbedding(9, 4, tie_weights=False), None, 7)
    assert untied.reverse_table_path == untied.layer.reverse_embeddings.path
    assert untied.reverse_table_path != untied.table_path


@pytest.fixture
def layer():
    first, second = keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")
    layer = keras.Sequential([first, second, keras.layers.ReLU()])
    layer.build((None, 4))
    return layer


def test_a_call_uses_the_values_that_it_is_given_and_leaves_the_layer_alone(layer):
    before = [np.asarray(variable.value) for variable in layer.weights]
    values = [np.full(variable.shape, 2.0, "float32") for variable in layer.weights]
    x = np.ones((1, 4), "float32")
    np.testing.assert_array_equal(call_with(layer, values, x), np.full((1, 2), 62.0))
    for variable, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)


def test_inputs_are_recorded_in_the_order_of_the_calls_and_only_within_the_block(layer):
    first, second = find_targets([layer])
    x = np.ones((1, 4), "float32")
    with recorded_inputs([second, first]) as inputs:
        expected = layer(x)
    assert [target.name for target, _ in inputs] == [first.name, second.name]
    np.testing.assert_array_equal(inputs[0][1], x)
    np.testing.assert_allclose(inputs[1][1], first.layer(x), rtol=1e-6)
    np.testing.assert_array_equal(layer(x), expected)
    assert len(inputs) == 2
    assert "call" not in vars(first.layer)


def test_layers_are_restored_after_an_error(layer):
    [first, _] = find_targets([layer])
    with pytest.raises(ZeroDivisionError), recorded_inputs([first]):
        raise ZeroDivisionError
    assert "call" not in vars(first.layer)

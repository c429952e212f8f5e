"""What a target tells of its layer's matrix and variables."""

import keras

from pipeline.model.targets import find_targets


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

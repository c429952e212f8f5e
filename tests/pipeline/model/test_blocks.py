from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from keras import tree

from pipeline.errors import SourceError
from pipeline.model.block_signature import block_signature
from pipeline.model.blocks import BlockGraph, find_blocks
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.model.targets import find_targets, find_unsupported
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import example_inputs, shared_preset, stock_task
from tests.selection import by_default

# KerasHub leaves the file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

SIZE = {"vocabulary_size": 64, "num_layers": 3, "hidden_dim": 32, "intermediate_dim": 64}
LLAMA_TARGETS = [
    "self_attention/query",
    "self_attention/key",
    "self_attention/value",
    "self_attention/attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
]


def skeleton_of(path: Path) -> Skeleton:
    return build_skeleton(read_preset(str(path)))


def wrap(backbone: Any, task: Any = None) -> Skeleton:
    return Skeleton(backbone=backbone, task=task, backbone_json={}, task_json=None)


def weightless(kind: type, **options: Any) -> Any:
    with keras.StatelessScope(initialize_variables=False):
        return kind(**options)


def run(graph: BlockGraph, inputs: dict[str, Any]) -> Any:
    """Embed, then one block after the other, then the head."""
    struct = graph.embed.input
    embedded = graph.embed(
        {name: inputs[name] for name in struct} if isinstance(struct, dict) else inputs["inputs"]
    )
    # Keras unpacks a list of one.
    values = dict(zip(graph.embedded, tree.flatten(embedded), strict=True))
    for call in graph.calls:
        if call.glue is not None:
            found = call.glue.model([values[number] for number in call.glue.takes])
            values |= zip(call.glue.gives, tree.flatten(found), strict=True)
        values = {number: values[number] for number in call.live}
        args, kwargs = call.bind([values[number] for number in call.takes])
        values |= zip(call.gives, call.given(call.layer(*args, **kwargs)), strict=True)
    return graph.head(graph.bind_head(values, inputs))


@pytest.mark.parametrize("architecture", by_default(ARCHITECTURES, []))
def test_the_pieces_together_are_the_stock_model(architecture: str) -> None:
    stock, skeleton = stock_task(architecture), skeleton_of(shared_preset(architecture))
    graph = find_blocks(skeleton)
    for ours, theirs in zip(skeleton.model.variables, stock.variables, strict=True):
        ours.assign(theirs.value)
    inputs = example_inputs(stock)
    expected = np.asarray(stock(inputs))
    assert np.array_equal(np.asarray(run(graph, inputs)), expected)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_a_block_is_a_target_once(architecture: str) -> None:
    graph = find_blocks(skeleton_of(shared_preset(architecture)))
    for block in graph.blocks:
        kernels = {v.path for v in block.layer.variables if v.path.endswith("/kernel")}
        paths = [target.path for target in block.targets]
        assert {f"{path}/kernel" for path in paths} == kernels
        assert len(set(paths)) == len(paths)
        assert [f"{block.name}/{target.name}" for target in block.targets] == paths
        assert block.unsupported == ()


def test_targets_are_named_alike_in_every_block() -> None:
    graph = find_blocks(skeleton_of(shared_preset("Llama3")))
    assert [block.name for block in graph.blocks] == ["transformer_layer_0", "transformer_layer_1"]
    assert [[target.name for target in block.targets] for block in graph.blocks] == [
        LLAMA_TARGETS,
        LLAMA_TARGETS,
    ]


def test_what_is_outside_the_blocks_is_listed() -> None:
    graph = find_blocks(skeleton_of(shared_preset("Bert")))
    assert [target.path for target in graph.rest_targets] == [
        "token_embedding",
        "segment_embedding",
        "pooled_dense",
        "mlm_head/intermediate_dense",
    ]
    assert [layer.path for layer in graph.rest_unsupported] == ["position_embedding"]
    assert graph.head_inputs == ("mask_positions",)


@pytest.mark.exhaustive
def test_a_backbone_without_task_ends_in_its_own_outputs() -> None:
    backbone = stock_task("Bert").backbone
    graph = find_blocks(wrap(backbone))
    inputs = {
        "token_ids": np.arange(16, dtype=np.int32).reshape(2, 8),
        "padding_mask": np.ones((2, 8), np.int32),
        "segment_ids": np.zeros((2, 8), np.int32),
    }
    expected, got = backbone(inputs), run(graph, inputs)
    assert sorted(got) == ["pooled_output", "sequence_output"]
    for name in got:
        assert np.array_equal(np.asarray(got[name]), np.asarray(expected[name]))


def test_one_block_is_a_chain_too() -> None:
    path = shared_preset("Falcon", num_blocks=1)
    assert [block.index for block in find_blocks(skeleton_of(path)).blocks] == [0]


def test_equal_blocks_share_a_signature_and_others_do_not() -> None:
    signatures = {
        architecture: {
            block.signature
            for block in find_blocks(skeleton_of(shared_preset(architecture))).blocks
        }
        for architecture in ("Llama3", "Mistral", "GPT2")
    }
    assert {len(found) for found in signatures.values()} == {1}
    assert len(set.union(*signatures.values())) == 3


def test_signatures_tell_sliding_windows_from_full_attention() -> None:
    backbone = weightless(
        keras_hub.models.Gemma3Backbone,
        **{**SIZE, "num_layers": 7},
        num_query_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        image_size=16,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    )
    sliding = [
        block.layer.use_sliding_window_attention for block in find_blocks(wrap(backbone)).blocks
    ]
    signatures = [block.signature for block in find_blocks(wrap(backbone)).blocks]
    assert len(set(sliding)) == len(set(signatures)) == 2
    assert [found == signatures[0] for found in signatures] == [
        slides == sliding[0] for slides in sliding
    ]


def test_a_signature_depends_on_settings_shapes_and_dtypes_but_not_on_names() -> None:
    def signature(**options: Any) -> str:
        layer = keras.Sequential([keras.layers.Dense(4, **options)])
        layer.build((None, 8))
        return block_signature(layer, "call")

    assert signature(name="a") == signature(name="b")
    others = [
        signature(),
        signature(activation="relu"),
        signature(use_bias=False),
        signature(dtype="bfloat16"),
    ]
    assert len(set(others)) == 4


def test_experts_can_be_quantized_but_not_their_router() -> None:
    backbone = weightless(
        keras_hub.models.Qwen3MoeBackbone,
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        hidden_dim=32,
        intermediate_dim=64,
        moe_intermediate_dim=16,
        num_experts=4,
        top_k=2,
        norm_top_k_prob=True,
        decoder_sparse_step=1,
    )
    block = find_blocks(wrap(backbone)).blocks[0]
    banks = {
        "qwen3_sparse_moe_block/experts/expert_feedforward_gate_dense": (4, 32, 32),
        "qwen3_sparse_moe_block/experts/expert_feedforward_output_dense": (4, 16, 32),
    }
    assert [target.name for target in block.targets] == [*LLAMA_TARGETS[:4], *banks]
    for target, (num_experts, in_features, out_features) in zip(
        block.targets[4:], banks.values(), strict=True
    ):
        assert target.num_experts == num_experts
        assert (target.in_features, target.out_features) == (in_features, out_features)
        assert target.kernel_path == target.path
    [router] = block.unsupported
    assert "routes tokens" in router.reason


class Experts(keras.layers.Layer):
    num_experts = 3

    def build(self, input_shape: Sequence[int | None]) -> None:
        self.bank = self.add_weight(shape=(3, 4, 5), name="bank")
        self.offsets = self.add_weight(shape=(3, 5), name="offsets")


def test_the_matrix_of_experts_has_the_rows_of_all_in_turn() -> None:
    layer = Experts(name="experts")
    layer.build((None, 4))
    [target] = find_targets([layer])
    bank = np.arange(60.0).reshape(3, 4, 5)
    matrix = target.axes.to_matrix(bank)
    np.testing.assert_array_equal(matrix, np.concatenate([expert.T for expert in bank]))
    np.testing.assert_array_equal(target.axes.from_matrix(matrix), bank)


class OwnDense(keras.layers.Dense):
    """A subclass, which Keras refuses to quantize."""


def test_layers_that_stock_keras_cannot_hold_are_named_with_the_reason() -> None:
    inner = [
        keras.layers.EinsumDense("...x,xy->...y", output_shape=4, name="dots"),
        OwnDense(4, name="own"),
        keras.layers.Dense(4, name="plain"),
    ]
    layer = keras.Sequential(inner, name="block")
    layer.build((None, 4))
    assert [target.name for target in find_targets([layer], prefix="block")] == ["plain"]
    reasons = {found.path: found.reason for found in find_unsupported([layer])}
    assert "ellipsis" in reasons["block/dots"]
    assert "OwnDense" in reasons["block/own"]


def composite(name: str, width: int = 8) -> keras.layers.Layer:
    layers = [keras.layers.Dense(width), keras.layers.Dense(width)]
    return keras.Sequential(layers, name=name)


def branching(inputs: Any) -> Any:
    entry = keras.layers.Dense(8)(inputs)
    first, second = composite("first"), composite("second")
    return first(entry) + second(entry)


def bypassing(inputs: Any) -> Any:
    one = composite("first")(inputs)
    return composite("second")(one) + one


def interrupted(inputs: Any) -> Any:
    return composite("second")(composite("first")(inputs) * 2.0)


def repeated(inputs: Any) -> Any:
    first = composite("first")
    return composite("second")(first(first(inputs)))


@pytest.mark.parametrize("build", [branching, bypassing, interrupted, repeated])
def test_blocks_need_not_form_a_chain(build: Any) -> None:
    inputs = keras.Input((8,), name="inputs")
    model = keras.Model(inputs, build(inputs), name="model")
    given = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    graph = find_blocks(wrap(model))
    found = run(graph, {"inputs": given})
    np.testing.assert_array_equal(np.asarray(found), np.asarray(model(given)))
    assert [block.name for block in graph.blocks] == ["first", "second"]
    assert [len(block.calls) for block in graph.blocks] == ([2, 1] if build is repeated else [1, 1])
    assert [block.name for block in graph.shared_blocks] == (["first"] if build is repeated else [])


def test_values_are_kept_for_as_long_as_they_are_used() -> None:
    inputs = keras.Input((8,), name="inputs")
    model = keras.Model(inputs, bypassing(inputs), name="model")
    graph = find_blocks(wrap(model))
    first, second = graph.calls
    assert graph.embedded == first.takes == first.live
    assert second.takes == first.gives == second.live == graph.carried(second)
    assert graph.head_takes == (*first.gives, *second.gives) or graph.head_takes == (
        *second.gives,
        *first.gives,
    )


@pytest.mark.parametrize("architecture", ["Llama3", "Gemma3", "GPT2", "Bert"])
def test_a_chain_hands_on_its_hidden_states_alone(architecture: str) -> None:
    graph = find_blocks(skeleton_of(shared_preset(architecture)))
    first, second = graph.calls
    assert graph.carried(first) == ()
    assert graph.carried(second) == first.gives
    assert graph.head_takes == second.gives
    assert [call.glue for call in graph.calls] == [None, None]
    assert len(first.gives) == len(second.gives) == 1


def test_a_model_without_blocks_is_refused() -> None:
    inputs = keras.Input((8,), name="inputs")
    model = keras.Model({"inputs": inputs}, keras.layers.Dense(8)(inputs), name="model")
    with pytest.raises(SourceError, match="no transformer blocks"):
        find_blocks(wrap(model))

"""Folds are found in every family, and divide an input by scales exactly, and nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.calibration.windows import TokenWindows
from pipeline.fold import Fold
from pipeline.model.blocks import find_blocks
from pipeline.model.inputs import input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.model.targets import Target, call_with, outputs_with, recorded_inputs
from pipeline.plan import Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.weights.source import open_source
from quantizer import kernel_layout
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import text_file
from tests.selection import by_default

AWQ = {"mode": "awq", "group_size": 8, "foldable": True}
DEFAULT, EXHAUSTIVE = ("Llama3", "Gemma"), ("GPT2", "Bert", "OPT")
FAMILIES = [
    *DEFAULT,
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in EXHAUSTIVE),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
        if name not in DEFAULT + EXHAUSTIVE
    ),
]
NOTHING = "not foldable: no norm or layer before it can take up scales and change nothing else"


def planned(architecture: str, *, dtype: str = "float32", **settings: Any) -> Plan:
    recipe = {
        "name": "foldable",
        "scheme": AWQ,
        "calibration": {"texts": [str(text_file())], "num_samples": 2, "sequence_length": 16},
        **settings,
    }
    source = read_preset(str(shared_preset(architecture, num_blocks=2, dtype=dtype)))
    return make_plan(source, recipe_from_dict(recipe), threads=1).plan


planned_once = cache(planned)


class OneBlock:
    """A block with its weights, to run on what enters it."""

    def __init__(self, architecture: str, number: int) -> None:
        preset = read_preset(str(shared_preset(architecture, num_blocks=2, dtype="float32")))
        skeleton = build_skeleton(preset)
        graph = find_blocks(skeleton)
        self.block = graph.blocks[number]
        source = open_source(preset, skeleton)
        self.weights = dict(source.read_layer(self.block.layer))
        rng = np.random.default_rng(0)
        tokens = rng.integers(5, 60, (2, 12)).astype(np.int32)
        layout = input_layout(skeleton)
        windows = TokenWindows(
            tokens=tokens, lengths=np.array([12, 9], np.int32), fingerprint="", num_documents=0
        )
        batch = layout.batch(windows, slice(0, 2), 2)
        rest = source.read(source.rest_paths(graph))
        values = [rest[variable.path] for variable in graph.embed.weights]
        embed = jax.jit(
            lambda given: outputs_with(graph.embed, given, batch.structured(graph.embed))
        )
        found = dict(zip(graph.embedded, embed(values), strict=True))
        # The embedded tokens are as good as what the block before gives.
        states = max(found.values(), key=lambda value: value.ndim)
        self.taken = [found.get(value, states) for value in self.block.calls[0].takes]
        self._compiled = jax.jit(self._run)

    def target(self, name: str) -> Target:
        return next(target for target in self.block.targets if target.name == name)

    def run(self, changed: dict[str, NDArray[Any]]) -> tuple[dict[str, Any], list[Any]]:
        """The input of each layer, and what the block gives."""
        weights = [
            changed.get(variable.path, self.weights[variable.path])
            for variable in self.block.layer.weights
        ]
        inputs, outputs = self._compiled(weights)
        return {name: np.asarray(value) for name, value in inputs.items()}, outputs

    def _run(self, weights: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        call = self.block.calls[0]
        args, kwargs = call.bind(self.taken)
        with recorded_inputs(self.block.targets) as recorded:
            output = call_with(self.block.layer, weights, *args, **kwargs)
        return {target.name: tensor for target, tensor in recorded}, list(call.given(output))


def folded(plan: Plan, part: int = 1) -> dict[tuple[str, ...], Fold]:
    return {one.targets: one.fold for one in plan.parts[part].groups if one.fold is not None}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_folded_variables_divide_the_input_and_change_nothing_else(architecture: str) -> None:
    plan = planned_once(architecture)
    block = OneBlock(architecture, 1)
    inputs, outputs = block.run({})
    rng = np.random.default_rng(1)
    folds = folded(plan, 2)
    assert folds
    for names, fold in folds.items():
        layout = kernel_layout(block.target(names[0]).layer)
        numbers = fold.scale_of_input(layout.in_features)
        # Powers of two divide exactly.
        scale = np.exp2(rng.integers(-2, 3, layout.in_features)).astype(np.float32)[numbers]
        divided = {one.path: one.divided(block.weights[one.path], scale) for one in fold.variables}
        for one in fold.variables:
            assert not np.array_equal(divided[one.path], block.weights[one.path])
        tolerance = 1e-6 if any(one.offset for one in fold.variables) else 0.0
        found, _ = block.run(divided)
        expected = layout.flatten_inputs(inputs[names[0]]) / scale
        np.testing.assert_allclose(
            layout.flatten_inputs(found[names[0]]), expected, rtol=tolerance, atol=tolerance
        )
        for name in names:
            target = block.target(name)
            own = kernel_layout(target.layer)
            matrix = own.to_matrix(block.weights[target.kernel_path])
            divided[target.kernel_path] = own.from_matrix(matrix * scale)
        _, answers = block.run(divided)
        for answer, output in zip(answers, outputs, strict=True):
            np.testing.assert_allclose(answer, output, rtol=tolerance, atol=10 * tolerance)


EXPECTED = {
    # Norms before attention and MLP, values before the output, up before down.
    "Llama3": (4, []),
    "Gemma": (4, []),
    # GELU lets no scale pass.
    "GPT2": (3, ["feedforward_output_dense"]),
    # Its norms come last: what they give is added to the next ones' input, too.
    "Bert": (
        1,
        [
            "self_attention_layer/query",
            "self_attention_layer/key",
            "self_attention_layer/value",
            "feedforward_intermediate_dense",
            "feedforward_output_dense",
        ],
    ),
    # ReLU does.
    "OPT": (4, []),
}


@pytest.mark.parametrize("architecture", by_default(EXPECTED, ["Llama3", "Gemma", "GPT2"]))
def test_where_nothing_takes_scales_up_the_plan_says_so(architecture: str) -> None:
    number, without = EXPECTED[architecture]
    part = planned_once(architecture).parts[2]
    assert len(folded(planned_once(architecture), 2)) == number
    assert [layer.name for layer in part.layers if layer.note] == without
    for layer in part.layers:
        assert layer.note.startswith("not foldable: ") == (layer.name in without)


def test_scales_of_values_are_shared_by_the_heads_that_read_them() -> None:
    fold = folded(planned_once("Llama3"))["self_attention/attention_output",]
    [variable] = fold.variables
    assert variable.path.endswith("self_attention/value/kernel")
    # Four query heads of 16 on two heads of values.
    numbers = fold.scale_of_input(64).reshape(2, 2, 16)
    np.testing.assert_array_equal(numbers[:, 0], numbers[:, 1])
    assert len(np.unique(numbers)) == 32


def rule(pattern: str, scheme: Any) -> dict[str, Any]:
    return {"rules": [{"pattern": pattern, "scheme": scheme}]}


@pytest.mark.parametrize(
    ("settings", "layer", "message"),
    [
        (
            rule("value", None),
            "self_attention/query",
            "self_attention/value reads the same input, but not by this scheme",
        ),
        (
            rule("value", {"mode": "gptq", "group_size": 8}),
            "self_attention/query",
            "self_attention/value reads the same input, by another scheme",
        ),
        (
            rule("feedforward_intermediate", {"mode": "float8"}),
            "feedforward_output_dense",
            "feedforward_intermediate_dense gives this input, and float8 has no scale for each",
        ),
    ],
    ids=["one in float", "two schemes", "into float8"],
)
def test_layers_around_must_allow_it(settings: dict[str, Any], layer: str, message: str) -> None:
    plan = planned("Llama3", **settings)
    layers = {one.name: one for one in plan.parts[1].layers}
    assert message in layers[layer].note
    assert layer not in {name for names in folded(plan) for name in names}


def test_plans_come_back_with_their_folds_and_mention_none_without() -> None:
    plan = planned_once("Llama3")
    assert Plan.from_json(plan.to_json()) == plan
    assert b'"fold":' in plan.to_json()
    scheme = {key: value for key, value in AWQ.items() if key != "foldable"}
    other = planned("Llama3", name="plain", scheme=scheme)
    assert b'"fold' not in other.to_json()
    assert not any(layer.note for part in other.parts for layer in part.layers if layer.scheme)

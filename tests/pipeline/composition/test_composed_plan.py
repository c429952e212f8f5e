"""Runs that differ in nothing but their schemes make one plan; others are refused."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from pipeline.composition.composed_plan import (
    GivenLayers,
    GivenRun,
    check_composable,
    composed_plan,
    parts_of_runs,
)
from pipeline.errors import PipelineError
from pipeline.plan import Plan
from pipeline.recipe.recipe import Recipe
from pipeline.run.records import FileDigest, Manifest, PartRecord, file_key
from pipeline.storage.object_store import open_store
from quantizer.schemes import Float8Scheme, GPTQScheme, Int8Scheme
from tests.pipeline.tiny_runs import planned


def given(plan: Plan, name: str) -> GivenRun:
    """A finished run by a plan, as far as its records tell."""
    plan = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"name": name}))
    records = tuple(
        PartRecord(
            part=part.part,
            plan_digest=plan.digest,
            file=file_key(part.part),
            sha256=FileDigest.of(name.encode()).sha256,
            size_bytes=1,
            loaded_bytes=1,
        )
        for part in plan.parts
    )
    manifest = Manifest(plan_digest=plan.digest, files={}, records={}, provenance={})
    store = open_store(f"memory://given/{name}")
    return GivenRun(store=store, plan=plan, manifest=manifest, records=records)


def with_bits(plan: Plan, bits: int) -> Plan:
    """The same plan for another width."""
    scheme = GPTQScheme(weight_bits=bits, group_size=32)
    parts = [
        dataclasses.replace(
            part,
            layers=tuple(dataclasses.replace(x, scheme=x.scheme and scheme) for x in part.layers),
        )
        for part in plan.parts
    ]
    return dataclasses.replace(
        plan,
        parts=tuple(parts),
        policies=dict.fromkeys(plan.policies, f"gptq/{bits}/32"),
        recipe=plan.recipe.model_copy(update={"scheme": scheme}),
    )


@cache
def runs() -> tuple[GivenRun, GivenRun, GivenRun]:
    gptq = planned("gptq").plan
    return given(gptq, "w4"), given(with_bits(gptq, 3), "w3"), given(planned("int8").plan, "int8")


def test_each_block_is_what_its_run_made_it() -> None:
    given_runs = runs()
    check_composable(given_runs)
    plan = composed_plan(given_runs, [2, 0, 1], "mixed")
    assert plan.parts == tuple(given_runs[n].plan.parts[p] for p, n in enumerate((0, 2, 0, 1)))
    assert plan.tokens == given_runs[0].plan.tokens
    for layer in (layer for part in plan.parts[1:] for layer in part.layers):
        assert plan.recipe.scheme_for(layer.path, layer.kind) == layer.scheme
        assert plan.policies.get(layer.path) == (layer.scheme and layer.scheme.policy)
    assert [origin.recipe for origin in plan.composed] == ["w4", "int8", "w4", "w3"]
    assert Plan.from_json(plan.to_json()) == plan
    # Other blocks are another plan, also where the schemes are the same.
    assert plan.digest != composed_plan(given_runs, [2, 0, 0], "mixed").digest


def test_layers_that_a_rule_treats_otherwise_stay_so() -> None:
    other = runs()[1]
    path = other.plan.parts[2].layers[0].path
    rule: dict[str, Any] = {"pattern": "query", "scheme": {"mode": "int8"}}
    recipe = Recipe.model_validate(other.plan.recipe.to_dict() | {"rules": [rule]})
    assert "query" in path
    other = dataclasses.replace(other, plan=dataclasses.replace(other.plan, recipe=recipe))
    plan = composed_plan((runs()[0], other), [0, 1, 0], "mixed")
    found = {x.path: plan.recipe.scheme_for(x.path, x.kind) for x in plan.parts[2].layers}
    assert found[path] == Int8Scheme()
    assert {s and s.policy for p, s in found.items() if p != path} == {"gptq/3/32"}
    for layer in plan.parts[1].layers:
        assert plan.recipe.scheme_for(layer.path, layer.kind) == layer.scheme


def test_each_layer_is_what_its_run_made_it() -> None:
    given_runs = runs()
    layers = [x for x in given_runs[0].plan.parts[2].layers if x.scheme]
    query = next(x.path for x in layers if "query" in x.path)
    inputs = next(g for g in given_runs[0].plan.parts[2].groups if query.endswith(g.targets[0]))
    attention = tuple(x.path for x in layers if x.name in inputs.targets)
    last = layers[-1].path
    others = (
        GivenLayers(block=1, run=1, layers=attention),
        GivenLayers(block=1, run=2, layers=(last,)),
    )
    plan = composed_plan(given_runs, [1, 0, 1], "mixed", others)
    giver = {path: one.run for one in others for path in one.layers}
    for layer in plan.parts[2].layers:
        own = {x.path: x for x in given_runs[giver.get(layer.path, 0)].plan.parts[2].layers}
        assert layer == own[layer.path]
        assert plan.recipe.scheme_for(layer.path, layer.kind) == layer.scheme
        assert plan.policies.get(layer.path) == (layer.scheme and layer.scheme.policy)
    # Of a layer that needs no calibration no input is summed.
    calibrated = [path for path in given_runs[0].plan.parts[2].groups if last not in path.targets]
    names = {name for group in plan.parts[2].groups for name in group.targets}
    assert names == {x.name for x in layers if x.path != last}
    assert [g.targets for g in plan.parts[2].groups] == [
        g.targets for g in calibrated if names.issuperset(g.targets)
    ]
    origin = plan.composed[2]
    assert origin.recipe == "w4"
    assert [(x.recipe, x.layers) for x in origin.layers] == [("w3", attention), ("int8", (last,))]
    assert not plan.composed[1].layers
    assert Plan.from_json(plan.to_json()) == plan
    of = parts_of_runs(plan, given_runs)
    assert [(x.part, x.url) for x in of.layers] == [
        (2, given_runs[1].store.root_url),
        (2, given_runs[2].store.root_url),
    ]


def test_one_runs_blocks_alone_are_its_plan_and_where_they_come_from() -> None:
    plan = composed_plan(runs(), [1, 1, 1], "mixed")
    assert dataclasses.replace(plan, composed=()) == runs()[1].plan
    assert {origin.recipe for origin in plan.composed} == {"w3"}


def changed(run: GivenRun, **fields: Any) -> GivenRun:
    plan = dataclasses.replace(run.plan, **fields)
    return dataclasses.replace(
        run, plan=plan, manifest=dataclasses.replace(run.manifest, plan_digest=plan.digest)
    )


def test_runs_that_differ_in_more_than_their_scheme_are_refused() -> None:
    w4, w3, int8 = runs()
    assert w3.plan.tokens is not None
    tokens = dataclasses.replace(w3.plan.tokens, digest="0" * 64)
    table = next(x for x in w3.plan.parts[0].layers if x.kind == "embedding")
    outside = dataclasses.replace(
        w3.plan.parts[0],
        layers=tuple(
            dataclasses.replace(x, scheme=Int8Scheme()) if x == table else x
            for x in w3.plan.parts[0].layers
        ),
    )
    refused = {
        "other source": changed(w3, source_files_sha256="0" * 64),
        "dtype bfloat16, there None": changed(
            w3, recipe=w3.plan.recipe.model_copy(update={"dtype": "bfloat16"})
        ),
        "other calibration windows": changed(w3, tokens=tokens),
        "calibrated in bfloat16, there in float32": changed(w3, forward_dtype="bfloat16"),
        "threads 7, there 2": changed(w3, machine=w3.plan.machine | {"threads": "7"}),
        "jax 0, there": changed(w3, versions=w3.plan.versions | {"jax": "0"}),
        "outside the blocks, is int8, there float": changed(
            w3, parts=(outside, *w3.plan.parts[1:])
        ),
    }
    for words, run in refused.items():
        with pytest.raises(PipelineError, match=words):
            check_composable((w4, run))
    # Calibration is that of the runs that have any, wherever they stand.
    with pytest.raises(PipelineError, match=r"given/w3 differs from .*given/w4 .*other calib"):
        check_composable((int8, w4, changed(w3, tokens=tokens)))
    with pytest.raises(PipelineError, match="at least two"):
        check_composable((w4,))


def test_runs_calibrated_on_the_float_model_go_with_the_others() -> None:
    w4, w3, int8 = runs()
    assert w3.plan.recipe.calibration is not None
    calibration = w3.plan.recipe.calibration.model_copy(update={"statistics": "float"})
    on_float = changed(
        w3,
        recipe=w3.plan.recipe.model_copy(update={"calibration": calibration}),
        parts=tuple(dataclasses.replace(x, captured=x.groups) for x in w3.plan.parts),
        statistics_url="file:///elsewhere",
    )
    assert not on_float.plan.chained
    check_composable((on_float, w4, int8))
    float8 = changed(w4, recipe=w4.plan.recipe.model_copy(update={"scheme": Float8Scheme()}))
    mixed = composed_plan((on_float, float8), [0, 0, 1], "mixed")
    # No recipe asks for float8 on the float model's statistics.
    assert mixed.recipe.calibration == w4.plan.recipe.calibration
    assert not mixed.chained
    assert not mixed.statistics_url
    alone = composed_plan((on_float, int8), [0, 1, 1], "mixed")
    assert alone.recipe.calibration == calibration
    assert w3.plan.tokens is not None
    tokens = dataclasses.replace(w3.plan.tokens, digest="0" * 64)
    with pytest.raises(PipelineError, match="other calibration windows"):
        check_composable((int8, w4, changed(on_float, tokens=tokens)))

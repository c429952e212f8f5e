"""Statistics of the float model are captured once, and blocks solved on them in any order."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

from pipeline.artifact.parts import encode_solved_part
from pipeline.artifact.weights_file import read_weights_file
from pipeline.errors import RecipeError, StatisticsError
from pipeline.float_statistics import statistics_plan
from pipeline.model.preset import read_preset
from pipeline.plan import PartPlan, Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.commits import damaged_files, quarantine, read_manifest
from pipeline.run.records import MANIFEST_KEY, file_key, record_key
from pipeline.run.solved_layers import SolvedLayer
from pipeline.run.sums_records import statistics_bytes, sums_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.solve_stored import at_scheme, solve_block
from pipeline.worker.statistics import finished
from pipeline.worker.stored_sums import BlockSums
from quantizer import HessianSum
from quantizer.schemes import GPTQScheme
from tests.families.tiny_families import shared_family
from tests.pipeline.artifacts import load
from tests.pipeline.float_runs import (
    execute_in_float,
    lasting_all,
    planned_in_float,
    sharing,
    statistics_of_run,
)
from tests.pipeline.late_commits import LateCommits
from tests.pipeline.lazy_calls import LazyCalls
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    execute,
    lasting,
    model_state,
    planned,
    recipe,
    source,
)
from tests.selection import by_default

_fresh = itertools.count()


def fresh() -> ObjectStore:
    return open_store(f"memory://float-statistics/{next(_fresh)}")


@cache
def expected() -> dict[str, bytes]:
    """What one worker leaves when nothing happens, statistics included."""
    store = fresh()
    execute_in_float(planned_in_float("gptq"), store)
    return lasting_all(store)


def stock_inputs(model: Any, block: int, name: str, tokens: Any) -> Any:
    """The rows that a layer of stock Keras reads."""
    path = f"{model.backbone.transformer_layers[block].path}/{name}"
    [layer] = [layer for layer in model.backbone._flatten_layers() if layer.path == path]
    seen = []

    def call(inputs: Any, **kwargs: Any) -> Any:
        seen.append(np.asarray(inputs, np.float64))
        return type(layer).call(layer, inputs, **kwargs)

    object.__setattr__(layer, "call", call)
    model.backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    object.__delattr__(layer, "call")
    [rows] = seen
    return rows.reshape(tokens.size, -1)


def test_stored_sums_are_those_over_the_float_models_inputs() -> None:
    given, store = planned_in_float("gptq"), fresh()
    captured, found = statistics_of_run(given, store)
    execute(captured, found, workers=2)
    assert given.windows is not None
    last = given.plan.parts[NUM_BLOCKS]
    sums = BlockSums.read(found, captured.plan.digest, last.part)
    model = load(source(), "float32")
    for group in last.captured:
        rows = stock_inputs(model, NUM_BLOCKS - 1, group.targets[0], given.windows.tokens)
        total = finished(sums.of(group.targets[-1]))
        assert isinstance(total, HessianSum)
        np.testing.assert_allclose(total.gram_CC, rows.T @ rows, rtol=2e-4, atol=2e-3)
        assert total.num_rows == len(rows)
    stored = sum(found.size(sums_key(part + 1)) for part in range(NUM_BLOCKS))
    assert 0 <= stored - statistics_bytes(given.plan) < 1000 * NUM_BLOCKS  # headers


@pytest.mark.exhaustive
def test_the_first_block_is_solved_as_in_sequence_where_nothing_of_it_is_quantized_before() -> None:
    """Its query, key and value have the same inputs either way; what follows them does not."""
    in_turn = fresh()
    execute(planned("gptq"), in_turn)
    ours, theirs = (
        read_weights_file(x, max_bytes=1 << 24)
        for x in (expected()[file_key(1)], in_turn.get(file_key(1)))
    )
    same = {
        name
        for name, arrays in ours.items()
        if all(a.tobytes() == b.tobytes() for a, b in zip(arrays, theirs[name], strict=True))
    }

    def of(layer: str) -> str:
        [name] = [name for name in ours if f"_{layer}_dense/" in name]
        return name

    assert {of("query"), of("key"), of("value")} <= same
    assert of("feedforward_output") not in same


@pytest.mark.parametrize("workers", by_default([2, 3, 4], default=[3]))
def test_any_number_of_workers_leaves_the_same_bytes(workers: int) -> None:
    store = fresh()
    execute_in_float(planned_in_float("gptq"), store, workers=workers)
    assert lasting_all(store) == expected()


@pytest.mark.parametrize(
    "call",
    by_default(
        [
            (method, number)
            for method in ("restore", "capture", "merge", "send", "commit_sums", "propagate")
            for number in (1, 2, 3)
            if (method, number) != ("restore", 3)  # once by each of two workers
        ]
        + [("finalize", 1)],
        default=[("commit_sums", 2), ("capture", 3)],
    ),
)
def test_a_worker_that_is_lost_while_it_captures_changes_no_byte(call: tuple[str, int]) -> None:
    method, number = call
    store = fresh()
    captured, found = statistics_of_run(planned_in_float("gptq"), store)
    _, executor = execute(captured, found, workers=2, lose=[(method, number)], keep_every=1)
    assert executor.calls[method] >= number
    of_statistics = {k: x for k, x in expected().items() if k.startswith("statistics/")}
    prefix = found.root_url.removeprefix(f"{store.root_url}/")
    assert {f"{prefix}/{key}": x for key, x in lasting(found).items()} == of_statistics


def test_statistics_that_are_committed_while_the_next_block_is_captured_are_the_same() -> None:
    store = fresh()
    execute_in_float(planned_in_float("gptq"), store, workers=2, make_executor=LateCommits)
    assert lasting_all(store) == expected()


def test_calls_may_come_in_any_order_that_what_they_are_given_allows() -> None:
    store = fresh()
    capturing, _ = execute_in_float(
        planned_in_float("gptq"), store, workers=2, make_executor=LazyCalls
    )
    assert lasting_all(store) == expected()
    assert capturing is not None
    assert capturing.calls["restore"] == 2  # nothing had to be repeated


@pytest.mark.exhaustive
def test_recipes_of_any_scheme_share_what_the_first_one_captured() -> None:
    root = fresh().root_url
    recipes = [
        planned_in_float("gptq"),
        planned_in_float("gptq", weight_bits=2, group_size=16, activation_order=True),
        planned_in_float("awq"),
    ]
    captures = []
    for number, given in enumerate(recipes):
        shared = sharing(given, root)
        assert shared.plan.digest == given.plan.digest
        capturing, solving = execute_in_float(shared, open_store(f"{root}/runs/{number}"))
        captures.append(0 if capturing is None else capturing.calls["commit_sums"])
        assert not solving.calls["capture"]
    assert captures == [NUM_BLOCKS, 0, 0]
    assert len({given.plan.digest for given in recipes}) == 3


def test_other_tokens_or_dtypes_have_other_statistics() -> None:
    plan = planned_in_float("gptq").plan
    digest = statistics_plan(plan).digest
    assert plan.tokens is not None
    others = [
        dataclasses.replace(plan, tokens=dataclasses.replace(plan.tokens, digest="0" * 64)),
        dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"dtype": "bfloat16"})),
        plan.of_source(["1" * 64] * len(plan.parts)),
        dataclasses.replace(plan, machine=plan.machine | {"threads": "3"}),
    ]
    assert len({digest, *(statistics_plan(other).digest for other in others)}) == 5
    moved = dataclasses.replace(plan, source_url="file:///elsewhere")
    assert statistics_plan(moved).digest == digest


@pytest.mark.parametrize("damage", by_default(["bit", "missing", "record"], default=["bit"]))
def test_damaged_statistics_are_refused_and_only_what_is_damaged_is_made_again(damage: str) -> None:
    given, store = planned_in_float("gptq"), fresh()
    captured, found = statistics_of_run(given, store)
    execute(captured, found)
    key = record_key(2) if damage == "record" else sums_key(2)
    data = found.get(key)
    if damage == "missing":
        found.delete(key)
    else:
        found.put(key, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(StatisticsError, match=rf"statistics cannot be used: .*{key}"):
        execute(given, store)
    quarantine(found, damaged_files(found, read_manifest(found)))
    _, again = execute(captured, found)
    assert again.calls["commit_sums"] == 1
    _, solving = execute(given, store)
    assert lasting_all(store) == expected()
    # What was solved before the damage was found stays.
    assert 0 not in solving.solved_parts()


@cache
def captured_block() -> BlockSums:
    """The sums of the second block."""
    captured, found = statistics_of_run(planned_in_float("gptq"), fresh())
    execute(captured, found)
    return BlockSums.read(found, captured.plan.digest, 2)


def solved_apart(part: PartPlan) -> list[SolvedLayer]:
    plan = planned_in_float("gptq").plan
    model = model_state(plan.to_json(), plan.source_url)
    return solve_block(model.targets(2), part, model.read(2), captured_block())


def test_a_block_solved_apart_has_the_runs_own_bytes() -> None:
    plan = planned_in_float("gptq").plan
    model = model_state(plan.to_json(), plan.source_url)
    layers = {layer.path: layer for layer in solved_apart(plan.parts[2])}
    _, files = encode_solved_part(plan, model.parts[2], "", model.read(2), layers)
    assert files[file_key(2)] == expected()[file_key(2)]


@pytest.mark.exhaustive
def test_a_block_is_solved_apart_at_any_width() -> None:
    part = planned_in_float("gptq").plan.parts[2]

    def error(bits: int) -> float:
        scheme = GPTQScheme(weight_bits=bits, group_size=32)
        other = at_scheme(part, {name: scheme for g in part.groups for name in g.targets})
        return sum(layer.report["output_error"] for layer in solved_apart(other))

    assert error(4) < error(2)
    with pytest.raises(KeyError, match="no stored statistics"):
        at_scheme(part, {"elsewhere": GPTQScheme()})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tuning": {"steps": 1}}, "tuning trains each block on what the quantized blocks"),
        (
            {"scheme": {"mode": "gptq", "drift_correction": 0.5}},
            "drift_correction corrects how far",
        ),
        ({"scheme": {"mode": "float8"}}, "float8 needs the largest inputs"),
    ],
)
def test_recipes_that_need_other_statistics_are_refused(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RecipeError, match=rf"{problem}.*statistics: sequential"):
        recipe_from_dict(recipe("gptq", statistics="float").to_dict() | values)


def mixture_in_float() -> dict[str, Any]:
    values = recipe("gptq", statistics="float").to_dict()
    values["calibration"]["sequence_length"] = 32
    values["scheme"]["group_size"] = 16
    return values


def test_experts_on_float_statistics_are_refused_in_planning() -> None:
    preset = read_preset(str(shared_family("Mixtral")))
    with pytest.raises(RecipeError, match=r"experts are calibrated on the tokens.*int8, int4"):
        make_plan(preset, recipe_from_dict(mixture_in_float()), threads=2)


@pytest.mark.exhaustive
def test_what_is_beside_experts_is_solved_on_float_statistics() -> None:
    preset = read_preset(str(shared_family("Mixtral")))
    values = mixture_in_float()
    values["rules"] = [{"pattern": "experts/", "scheme": {"mode": "int8"}}]
    given, store = make_plan(preset, recipe_from_dict(values), threads=2), fresh()
    assert given.plan.uses_float_statistics
    assert not any("experts" in n for p in given.plan.parts for g in p.captured for n in g.targets)
    execute_in_float(given, store)
    assert store.exists(MANIFEST_KEY)


def test_sequential_statistics_are_named_in_no_stored_byte() -> None:
    values = recipe("gptq").to_dict()
    assert recipe("gptq", statistics="sequential").to_dict() == values
    assert "statistics" not in values["calibration"]
    stored = planned("gptq").plan.to_json()
    assert not any(word in stored for word in (b"statistics_url", b"captured", b"makes"))
    given = planned_in_float("gptq").plan
    assert Plan.from_json(given.to_json()) == given
    assert Plan.from_json(statistics_plan(given).to_json()) == statistics_plan(given)

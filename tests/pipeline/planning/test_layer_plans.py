"""What share of a model a plan quantizes, and the refusal of plans that leave most of it out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.plan import LayerPlan, Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Recipe, Rule
from quantizer.schemes import AWQScheme, GPTQScheme, Int8Scheme
from tests.families.tiny_families import FAMILIES, shared_family, tiny_family
from tests.integration.quantized import recipe
from tests.pipeline.presets import shared_preset

INT8 = recipe(Int8Scheme())
GPTQ = recipe(GPTQScheme(weight_bits=4, group_size=16))
AWQ = recipe(AWQScheme(group_size=16, num_grid_points=4, clip_search=False))


def planned(preset: Path, wanted: Recipe) -> Plan:
    return make_plan(read_preset(str(preset)), wanted, threads=1).plan


def partial(wanted: Recipe) -> Recipe:
    return wanted.model_copy(update={"allow_partial": True})


def test_a_plan_that_leaves_most_weights_in_float_is_refused_unless_that_is_allowed() -> None:
    """There is no awq for experts, of which Mixtral mostly consists."""
    preset = shared_family("Mixtral")
    with pytest.raises(RecipeError, match=r"/experts/.*no awq for experts.*--allow-partial") as (
        refused
    ):
        planned(preset, AWQ)
    assert "\n" not in str(refused.value)
    found = planned(preset, partial(AWQ)).share.of_recipe
    assert f"would quantize {found:.0%} of the weights" in str(refused.value)


def test_the_share_counts_experts_but_not_what_the_recipe_leaves_out() -> None:
    preset = shared_family("Mixtral")
    sizes = {"attention": 0, "experts": 0}
    for variable in build_skeleton(read_preset(str(preset))).backbone.trainable_variables:
        size = math.prod(variable.shape)
        if variable.path.endswith("/kernel") and "self_attention" in variable.path:
            sizes["attention"] += size
        if "/experts/" in variable.path and len(variable.shape) == 3:
            sizes["experts"] += size
    plan = planned(preset, partial(AWQ))
    assert plan.share.of_recipe == pytest.approx(sizes["attention"] / sum(sizes.values()))
    without = recipe(AWQScheme(group_size=16), Rule(pattern="experts", scheme=None))
    assert planned(preset, without).share.of_recipe == 1.0
    assert planned(preset, INT8).share.of_recipe == 1.0


def test_plans_of_models_without_experts_are_written_as_before() -> None:
    plan = planned(shared_preset("Llama3"), INT8)
    assert plan.share.of_recipe == 1.0
    assert b"stacked_weights" not in plan.to_json()
    assert b"experts" not in plan.to_json()
    assert b"allow_partial" not in plan.to_json()


def test_plans_with_experts_are_read_back() -> None:
    plan = planned(shared_family("Mixtral"), GPTQ)
    assert Plan.from_json(plan.to_json()) == plan


def query_in_awq(num_heads: int, path: Path) -> LayerPlan:
    """The plan of Gemma's query, a kernel [num_heads, 32, 8] of which axis 1 is the inputs."""
    [gemma] = (family for family in FAMILIES if family.name == "Gemma")
    options = {**gemma.options, "num_query_heads": num_heads}
    preset = tiny_family(dataclasses.replace(gemma, options=options), path)
    plan = planned(preset, partial(recipe(AWQScheme(group_size=8))))
    return next(x for part in plan.parts for x in part.layers if x.path.endswith("/query"))


def test_awq_leaves_kernels_in_float_whose_rows_in_keras_mix_inputs(tmp_path: Path) -> None:
    """Keras takes the largest axis for the rows: here the heads, each with all inputs."""
    assert query_in_awq(16, tmp_path / "few heads").scheme == AWQScheme(group_size=8)
    left = query_in_awq(64, tmp_path / "many heads")
    assert left.scheme is None
    assert left.note == "stock Keras cannot store this kernel in awq; left in float"

"""What stock Keras could not load is known while planning."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import pytest

from pipeline.artifact.rehearsal import policies_of
from pipeline.errors import ArtifactError, SourceError
from pipeline.model.preset import read_preset
from pipeline.model.preset_json import policy_map
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.plan import Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Recipe, Rule
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme
from tests.families.tiny_families import shared_family
from tests.integration.quantized import recipe
from tests.pipeline.presets import shared_preset

GPTQ = GPTQScheme(weight_bits=4, group_size=16, scale_search=False)


def planned(preset: Path, wanted: Recipe) -> Plan:
    partial = wanted.model_copy(update={"allow_partial": True})
    return make_plan(read_preset(str(preset)), partial, threads=1).plan


def quantized_paths(preset: Path, plan: Plan, *, many_made: bool) -> list[str]:
    """The layers that stock KerasHub makes quantized, by path in a fresh process."""
    policies = policy_map("float32", plan.policies)
    built = build_skeleton(read_preset(str(preset)), policies, many_made=many_made)
    fresh = build_skeleton(read_preset(str(preset)))
    return [
        layer.path
        for layer, other in zip(fresh.backbone_layers, built.backbone_layers, strict=True)
        if getattr(other, "quantization_mode", None) is not None
    ]


@pytest.mark.parametrize("many_made", [False, True])
def test_layers_with_generated_names_are_found_whatever_the_process_built_before(
    many_made: bool,
) -> None:
    """QwenMoe's experts are in qwen_sparse_moe_block, qwen_sparse_moe_block_1, … of a process."""
    preset = shared_family("QwenMoe")
    plan = planned(preset, recipe(Int8Scheme()))
    layers = [layer for part in plan.parts for layer in part.layers if layer.scheme]
    wanted = [layer.path for layer in layers if not layer.experts]  # which stay float in Keras
    assert any("qwen_sparse_moe_block_1/" in path for path in wanted)
    assert sorted(quantized_paths(preset, plan, many_made=many_made)) == sorted(wanted)


def test_names_that_a_model_gives_are_keys_as_they_are() -> None:
    plan = planned(shared_preset("Llama3"), recipe(Int8Scheme()))
    paths = [layer.path for part in plan.parts for layer in part.layers if layer.scheme]
    assert sorted(plan.policies) == sorted(paths)


def skeleton_with(*generated_names: str) -> Skeleton:
    return Skeleton(
        backbone=keras.Model(),
        task=None,
        backbone_json={},
        task_json=None,
        generated_names=frozenset(generated_names),
    )


def test_layers_that_only_a_generated_number_tells_apart_share_a_key() -> None:
    found = policies_of(
        skeleton_with("dense", "dense_1"),
        {"mlp.0/dense": Int8Scheme(), "mlp.0/dense_1": Int8Scheme(), "mlp.0/dense_2": Int8Scheme()},
    )
    assert found == {r"mlp\.0/dense(_\d+)?": "int8", "mlp.0/dense_2": "int8"}
    assert re.fullmatch(next(iter(found)), "mlp.0/dense_17")


@pytest.mark.parametrize("other", [None, GPTQ])
def test_layers_that_only_a_generated_number_tells_apart_need_one_scheme(
    other: Scheme | None,
) -> None:
    schemes = {"mlp/dense": Int8Scheme(), "mlp/dense_1": other}
    with pytest.raises(ArtifactError, match="mlp/dense and mlp/dense_1 differ only in a number"):
        policies_of(skeleton_with("dense", "dense_1"), schemes)


def test_a_model_that_cannot_be_built_in_a_format_is_refused_with_one_in_which_it_can() -> None:
    """GPT-OSS runs its blocks while it builds them, before a gptq layer has its weights."""
    preset = shared_family("GptOss")
    with pytest.raises(
        ArtifactError,
        match=r"with layers in gptq \(.*\); use int8, .* such as transformer_layer_0/",
    ) as refused:
        planned(preset, recipe(GPTQ))
    assert "\n" not in str(refused.value)
    assert planned(preset, recipe(Int8Scheme())).policies


def test_a_model_that_hands_its_dtype_on_to_no_layer_is_refused() -> None:
    with pytest.raises(ArtifactError, match="SmolLM3Backbone does not hand its dtype on"):
        planned(shared_family("SmolLM3"), recipe(Int8Scheme()))


def test_a_model_that_takes_one_dtype_only_is_refused() -> None:
    """Moonshine remembers something by its dtype, which must then be hashable."""
    with pytest.raises(ArtifactError, match="MoonshineBackbone of which any layer has a dtype"):
        planned(shared_family("Moonshine"), recipe(Int8Scheme()))


def test_blocks_that_hold_the_same_layers_are_refused() -> None:
    """Gemma3n's are inside two layers of the model."""
    with pytest.raises(SourceError, match="blocks of a Gemma3nBackbone cannot be told apart"):
        planned(shared_family("Gemma3n"), recipe(Int8Scheme()))


def test_layers_that_get_no_dtype_from_their_model_stay_in_float_and_say_so() -> None:
    """Qwen3.5's vision encoder, though a rule asks for it; the decoder beside it is quantized."""
    rule = Rule(pattern="vision_encoder", scheme=Int8Scheme())
    plan = planned(shared_family("Qwen3_5 with vision"), recipe(Int8Scheme(), rule))
    layers = {layer.path: layer for part in plan.parts for layer in part.layers}
    [left] = [x for path, x in layers.items() if path.endswith("vision_encoder/merger/mlp_2")]
    assert left.scheme is None
    assert "KerasHub does not hand the model's dtype on to it" in left.note
    assert any("transformer_layer_1" in path for path in plan.policies)


def test_a_backbone_for_which_kerashub_has_no_task_is_loaded_as_such() -> None:
    assert planned(shared_family("Electra"), recipe(Int8Scheme())).task == "ElectraBackbone"


def test_an_encoder_beside_the_blocks_stays_in_float_unless_a_rule_names_it() -> None:
    preset = shared_family("PaliGemma")
    rule = Rule(pattern="^image_", scheme=Int8Scheme())
    for rules, expected in (((), set()), ((rule,), {"int8"})):
        plan = planned(preset, recipe(GPTQ, *rules))
        layers = [layer for layer in plan.parts[0].layers if layer.path.startswith("image_")]
        assert {layer.scheme.mode for layer in layers if layer.scheme} == expected
        assert bool(rules) or all(layer.note for layer in layers if layer.kind == "kernel")

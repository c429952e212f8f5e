"""A plan decides everything, and refuses what cannot be done."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import pytest

import pipeline.planning.make_plan
import pipeline.weights.digests
from pipeline.errors import CalibrationTextError, RecipeError, SourceError
from pipeline.model.preset import read_preset
from pipeline.plan import LayerPlan, Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.weights.digests import VariableDigest
from quantizer.schemes import Int8Scheme
from tests.pipeline.tiny_runs import NUM_BLOCKS, planned, recipe, source, text_file

CALIBRATION = {"texts": [str(text_file())], "num_samples": 4, "sequence_length": 64}


def plan_of(architecture: str = "Llama3", **values: Any) -> Plan:
    wanted = {"name": "test", "scheme": None, "calibration": CALIBRATION} | values
    preset = read_preset(str(source(architecture)))
    return make_plan(preset, recipe_from_dict(wanted), threads=2).plan


def layers(plan: Plan) -> dict[str, LayerPlan]:
    return {layer.path: layer for part in plan.parts for layer in part.layers}


def test_the_same_request_is_the_same_plan() -> None:
    again = make_plan(read_preset(str(source())), recipe("gptq"), threads=2)
    assert again.plan == planned("gptq").plan
    assert again.windows is not None
    assert again.windows.to_bytes() == planned("gptq").windows.to_bytes()  # type: ignore[union-attr]


def test_a_plan_tells_what_each_weighted_source_gives(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"body": "Another kind of text. "}\n' * 200)
    texts = [
        {"url": str(text_file()), "weight": 3},
        {"url": str(tmp_path / "other.jsonl"), "weight": 1, "text_field": "body"},
    ]
    plan = plan_of(
        scheme={"mode": "gptq", "group_size": 32}, calibration=CALIBRATION | {"texts": texts}
    )
    assert plan.tokens is not None
    assert [(one.num_windows, one.num_tokens) for one in plan.tokens.sources] == [(3, 192), (1, 64)]
    assert plan.tokens.sources[1].num_documents > 1
    assert Plan.from_json(plan.to_json()) == plan


def test_threads_are_part_of_the_plan() -> None:
    other = make_plan(read_preset(str(source())), recipe("gptq"), threads=1).plan
    assert other.digest != planned("gptq").plan.digest


def test_weight_only_schemes_need_no_texts() -> None:
    wanted = recipe_from_dict(
        {
            "name": "x",
            "scheme": {"mode": "int8"},
            "calibration": {**CALIBRATION, "texts": ["/nowhere.txt"]},
        }
    )
    found = make_plan(read_preset(str(source())), wanted, threads=2)
    assert found.windows is None
    assert not found.plan.chained


def test_rules_decide_layer_by_layer() -> None:
    plan = plan_of(
        scheme={"mode": "int8"},
        rules=[
            {"pattern": "layer_1/.*query", "scheme": None},
            {"pattern": "feedforward_output", "scheme": {"mode": "gptq", "group_size": 64}},
        ],
        embeddings={"mode": "int8"},
    )
    found = layers(plan)
    assert found["transformer_layer_1/self_attention/query"].scheme is None
    assert found["transformer_layer_0/self_attention/query"].scheme == Int8Scheme()
    assert found["token_embedding"].scheme is not None
    for part in plan.parts[1:]:
        assert [group.targets for group in part.groups] == [("feedforward_output_dense",)]
    expected = {path for path, layer in found.items() if layer.scheme}
    assert set(plan.policies) == expected
    assert len(expected) == 1 + 7 * NUM_BLOCKS - 1


def test_what_cannot_be_quantized_stays_in_float_with_the_reason() -> None:
    found = layers(plan_of("Bert", scheme={"mode": "gptq", "group_size": 32}))
    assert found["pooled_dense"].scheme is None
    assert "inside blocks only" in found["pooled_dense"].note
    assert "PositionEmbedding" in found["position_embedding"].note
    assert all(
        layer.note
        for layer in found.values()
        if layer.scheme is None and "embedding" not in layer.path
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": {"mode": "gptq", "group_size": 128}}, "group_size of at most 64"),
        (
            {"scheme": None, "rules": [{"pattern": "nothing", "scheme": {"mode": "int8"}}]},
            "none of",
        ),
        (
            {
                "scheme": {"mode": "int8"},
                "rules": [{"pattern": "nothing", "scheme": {"mode": "gptq", "group_size": 32}}],
                "tuning": {},
            },
            "in this model none is",
        ),
    ],
)
def test_impossible_recipes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        plan_of(**values)
    assert "\n" not in str(raised.value)


def test_groups_need_not_divide_the_features() -> None:
    plan = plan_of(scheme={"mode": "gptq", "group_size": 48})
    assert layers(plan)["transformer_layer_0/self_attention/query"].in_features == 64


def test_a_source_with_wrong_shapes_is_refused_first(tmp_path: Path) -> None:
    preset = tmp_path / "preset"
    shutil.copytree(source(), preset)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        group = file["layers/reversible_embedding/vars"]
        values = group["0"][:-1]
        del group["0"]
        group["0"] = values
    with pytest.raises(SourceError, match="reversible_embedding"):
        make_plan(read_preset(str(preset)), recipe("int8"), threads=2)


def test_a_changed_weight_is_another_plan(tmp_path: Path) -> None:
    preset = tmp_path / "preset"
    shutil.copytree(source(), preset)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file["layers/reversible_embedding/vars/0"][0, 0] += 1
    other = make_plan(read_preset(str(preset)), recipe("int8"), threads=2).plan
    assert other.source_digest != planned("int8").plan.source_digest
    shutil.rmtree(preset)
    shutil.copytree(source(), preset)
    (preset / "README.md").write_text("# Llama")
    same = make_plan(read_preset(str(preset)), recipe("int8"), threads=2).plan
    assert same.digest == planned("int8").plan.digest


def test_windows_longer_than_the_model_s_positions_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"has 256 positions.*at most 256"):
        make_plan(read_preset(str(source("OPT"))), recipe("gptq", sequence_length=300), threads=2)


def test_too_little_text_is_reported_before_all_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = 0
    original = pipeline.weights.digests.variable_digest

    def slow(value: Any) -> VariableDigest:
        nonlocal read
        read += 1
        time.sleep(0.3)
        return original(value)

    def no_windows(*_: Any) -> None:
        raise CalibrationTextError("too little text")

    monkeypatch.setattr(pipeline.weights.digests, "_PIECE_BYTES", 1)
    monkeypatch.setattr(pipeline.weights.digests, "variable_digest", slow)
    monkeypatch.setattr(pipeline.planning.make_plan, "token_windows", no_windows)
    with pytest.raises(CalibrationTextError, match="too little text"):
        plan_of(scheme={"mode": "gptq", "group_size": 16})
    assert read <= 2  # by two threads, of some dozens

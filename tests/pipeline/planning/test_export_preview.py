from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ExportError
from pipeline.export.description import ExportDescription
from pipeline.export.exporting import checkpoint_of_run
from pipeline.export.settings import ExportSettings
from pipeline.model.preset import read_preset
from pipeline.planning.export_preview import check_planned_export, preview_export
from pipeline.recipe.recipe_file import recipe_from_dict
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.export.runs import finished_run, planned
from tests.pipeline.presets import shared_preset


@pytest.mark.parametrize("form", ["keras", "huggingface"])
def test_what_is_foreseen_is_what_is_made(form: str, tmp_path: Path) -> None:
    source = shared_preset("Llama3")
    if form == "huggingface":
        source = tiny_huggingface(tmp_path / "source", "llama")
    given: dict[str, Any] = {"embeddings": {"mode": "int8"}, "dtype": "bfloat16"}
    run, _ = finished_run(source, str(tmp_path / "run"), {"mode": "int8"}, **given)
    recipe = recipe_from_dict({"name": "r", "scheme": {"mode": "int8"}, **given})
    for settings in (ExportSettings(), ExportSettings(format="dense", dtype="float32")):
        foreseen = preview_export(read_preset(str(source)), recipe, settings)
        assert foreseen == ExportDescription.of(checkpoint_of_run(run, settings))


def test_what_only_a_plan_knows_is_checked_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = shared_preset("Llama3")
    plan = planned(source, {"mode": "awq", "group_size": 32, "foldable": True}).plan
    folds = [group.fold for part in plan.parts for group in part.groups if group.fold]
    assert folds
    check_planned_export(read_preset(str(source)), plan, ExportSettings())

    def without_place(*_: Any) -> None:
        raise ExportError("no place for it")

    monkeypatch.setattr("pipeline.export.checkpoint.folds_of", without_place)
    with pytest.raises(ExportError, match="no place for it"):
        check_planned_export(read_preset(str(source)), plan, ExportSettings())


def test_calibration_texts_are_not_read(tmp_path: Path) -> None:
    calibration = {"texts": [str(tmp_path / "missing.txt")]}
    scheme = {"mode": "gptq", "weight_bits": 4, "group_size": 32}
    recipe = recipe_from_dict({"name": "r", "scheme": scheme, "calibration": calibration})
    found = preview_export(read_preset(str(shared_preset("Llama3"))), recipe, ExportSettings())
    assert {row.kernel for row in found.tensors} == {"Marlin"}

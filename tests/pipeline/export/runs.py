"""Artifacts to export: finished runs, and such as nobody solved, for what reads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.code_formats import ExportFormat
from pipeline.model.preset import PresetFiles, read_preset
from pipeline.model.preset_json import quantized_json
from pipeline.plan import Plan
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.worker import Worker
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import text_file


def planned(source: Path, scheme: Mapping[str, Any], **settings: Any) -> Planned:
    """The plan of a small run.

    Args:
        settings: of the recipe, such as rules and embeddings.
    """
    calibration = {"texts": [str(text_file())], "num_samples": 4, "sequence_length": 32}
    recipe = {"name": "r", "scheme": dict(scheme), "calibration": calibration, **settings}
    return make_plan(read_preset(str(source)), recipe_from_dict(recipe), threads=2)


def finished_run(
    source: Path, url: str, scheme: Mapping[str, Any], **settings: Any
) -> tuple[ObjectStore, Manifest]:
    """A small run, from plan to manifest; see `planned`."""
    given = planned(source, scheme, **settings)
    store = open_store(url)
    claim(store, given.plan, None if given.windows is None else given.windows.to_bytes())
    executor = LocalExecutor([Worker(given.plan, str(source), store.root_url)])
    return store, quantize(given.plan, store, executor, lambda step: None)


def unsolved(source: Path, scheme: Mapping[str, Any], **settings: Any) -> tuple[Plan, PresetFiles]:
    """A plan for a KerasHub preset, and the artifact that it leads to, without its weights."""
    plan = planned(source, scheme, **settings).plan
    preset = read_preset(str(source))
    quantized = quantized_json(preset.json_files, plan.policies)
    return plan, dataclasses.replace(preset, json_files={**preset.json_files, **quantized})


def checkpoint_of(
    source: Path,
    scheme: Mapping[str, Any],
    as_format: ExportFormat = "compressed-tensors",
    *,
    like_url: str | None = None,
    **settings: Any,
) -> Checkpoint:
    """The planned checkpoint of an artifact without weights."""
    plan, artifact = unsolved(source, scheme, **settings)
    return plan_checkpoint(plan, artifact, as_format, like_url=like_url)

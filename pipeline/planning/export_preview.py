"""What an export of a run would be, before the run: from names, shapes and schemes alone.

Whatever can be refused of an export is refused here, before any weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pipeline.export.checkpoint import lay_out, plan_checkpoint
from pipeline.export.description import ExportDescription
from pipeline.export.settings import ExportSettings
from pipeline.model.blocks import find_blocks
from pipeline.model.huggingface import check_converted
from pipeline.model.preset import PresetFiles
from pipeline.model.preset_json import converted_files, quantized_json
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.plan import Plan
from pipeline.planning.layer_plans import plan_layers
from pipeline.recipe.recipe import Recipe


def preview_export(
    preset: PresetFiles, recipe: Recipe, settings: ExportSettings
) -> ExportDescription:
    """Describe the export of what a recipe would make of a model.

    Raises:
        ExportError: it cannot be exported so, and what to do instead.
        PipelineError: a source or recipe that cannot be used at all.
    """
    preset = preset.in_dtype(recipe.dtype)
    skeleton = build_skeleton(preset)
    layers, policies = plan_layers(preset, skeleton, find_blocks(skeleton), recipe)
    every = (layer for of_part in layers for layer in of_part)
    checkpoint = lay_out(
        _artifact(preset, skeleton, policies),
        {layer.path: layer.scheme for layer in every if layer.scheme is not None},
        preset.url,
        settings.format,
        dtype=settings.dtype,
        like_url=settings.like_url,
    )
    return ExportDescription.of(checkpoint)


def check_planned_export(preset: PresetFiles, plan: Plan, settings: ExportSettings) -> None:
    """Check what only a plan knows of a run's export: where input scales are folded.

    Raises:
        ExportError: it cannot be exported so, and what to do instead.
    """
    preset = preset.in_dtype(plan.recipe.dtype)
    plan_checkpoint(
        plan,
        _artifact(preset, build_skeleton(preset), plan.policies),
        settings.format,
        dtype=settings.dtype,
        like_url=settings.like_url,
    )


def _artifact(preset: PresetFiles, skeleton: Skeleton, policies: Mapping[str, str]) -> PresetFiles:
    """The artifact that a run will make of a preset, without its weights."""
    small_files = preset.json_files
    if preset.format == "huggingface":
        check_converted(preset, skeleton.backbone, skeleton.predicts_tokens)
        small_files = converted_files(preset, skeleton)
    json_files = {**small_files, **quantized_json(small_files, policies)}
    return dataclasses.replace(preset, format="keras", json_files=json_files)

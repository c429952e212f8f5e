"""Plan a run: read the preset's JSON, build its skeleton, decide every layer's scheme.

Everything that can be refused is refused here, before any weight is read or byte written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from pipeline.calibration.windows import TokenWindows, shard_bounds
from pipeline.errors import SourceError
from pipeline.float_statistics import statistics_plan
from pipeline.machine import machine, versions
from pipeline.model.blocks import BlockGraph, find_blocks
from pipeline.model.huggingface import check_converted
from pipeline.model.inputs import InputLayout, input_layout
from pipeline.model.preset import CONFIG_FILE, TASK_FILE, PresetFiles
from pipeline.model.preset_json import (
    base_policy,
    conversion_notes,
    converted_files,
    quantized_json,
)
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.plan import LayerPlan, PartPlan, Plan
from pipeline.planning.captured_groups import Groups, captured_groups
from pipeline.planning.folds import with_folds
from pipeline.planning.held_back import held_back_every
from pipeline.planning.input_groups import embedded_shapes, input_groups
from pipeline.planning.layer_plans import check_share, plan_layers
from pipeline.planning.micro_batch import fitting_micro_batch, micro_batches
from pipeline.planning.token_windows import blank_windows, token_windows
from pipeline.planning.tuning import check_trained
from pipeline.recipe.recipe import Recipe, statistics_of
from pipeline.tokens_plan import SourceTokens, TokensPlan
from pipeline.weights.digests import SizedPath, part_digests, read_in_threads
from pipeline.weights.source import open_source
from pipeline.worker.device_memory import device_memory
from quantizer.schemes import Float8Scheme


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, and the token windows that it names.

    Attributes:
        variables: of each part, the paths of its stored variables, and their bytes.
    """

    plan: Plan
    windows: TokenWindows | None
    variables: tuple[tuple[SizedPath, ...], ...]


def make_plan(
    preset: PresetFiles,
    recipe: Recipe,
    *,
    threads: int,
    read_weights: bool = True,
    read_texts: bool = True,
    given: TokenWindows | None = None,
) -> Planned:
    """Decide everything about a run.

    Args:
        threads: of each worker's matrix products, which decide their rounding on a CPU; as many
            read weights here.
        read_weights: False leaves their digests out of the plan (see `Plan.is_complete`), and
            reads no more of the files than where each variable is.
        read_texts: False plans for windows of the same shape without text; such a plan is not to
            be carried out.
        given: the windows, where they were cut for another recipe with the same calibration.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be used.
    """
    preset = preset.in_dtype(recipe.dtype)
    skeleton = build_skeleton(preset)
    graph = find_blocks(skeleton)
    layers, policies = plan_layers(preset, skeleton, graph, recipe)
    check_share(preset, recipe, layers)
    check_trained(recipe, layers[1:])
    if preset.format == "huggingface":
        # Before the weights: a tensor that is missing or left over does not say which key it is of.
        check_converted(preset, skeleton.backbone, skeleton.predicts_tokens)
    source = open_source(preset, skeleton)
    # Refuses sources that lack weights; their values are read part by part below.
    casts = source.casts()
    notes = [f"{number} variables are cast from {change}" for change, number in casts.items()]
    source.check_complete()
    small_files = preset.json_files
    if preset.format == "huggingface":
        # Refuses now what could not be written at the end.
        small_files = converted_files(preset, skeleton)
        notes += conversion_notes(small_files, policies)
    task = _task_name(skeleton, small_files, policies)
    schemes = [layer.scheme for of_part in layers for layer in of_part]
    calibration = recipe.calibration if any(map(statistics_of, schemes)) else None
    if calibration is not None:
        _refuse_shared_blocks(skeleton, graph)
    paths = [source.rest_paths(graph), *(source.layer_paths(b.layer) for b in graph.blocks)]
    variables = tuple(map(source.sized, paths))
    windows, digests = None, {}
    # Texts are cut meanwhile; if they are too short, that is said before all of a model is read.
    unread = [variable for of_part in variables for variable in of_part] if read_weights else []
    reading = read_in_threads(source, unread, threads)
    try:
        if calibration is not None:
            cut = token_windows if read_texts else blank_windows
            windows = given or cut(preset, skeleton, calibration)
        digests = reading.result()
    finally:
        reading.cancel()
    plan = Plan(
        source_url=preset.url,
        source_files_sha256=source.files_digest(),
        model=type(skeleton.backbone).__name__,
        task=task,
        recipe=Recipe.model_validate(recipe.to_dict()),
        tokens=None,
        parts=_parts(skeleton, graph, layers, *[[()] * len(graph.blocks)] * 2),
        machine=machine(threads),
        versions=versions(),
        policies=policies,
        forward_dtype=_forward_dtype(skeleton, jax.default_backend()),
        weights_format=2 if any(isinstance(scheme, Float8Scheme) for scheme in schemes) else 1,
        notes=tuple(notes),
    )
    if windows is not None:
        plain = plan
        plan = _calibrated(plain, skeleton, graph, layers, windows)
        # What is stored for all recipes may depend on none.
        passing = statistics_plan(plan) if plan.uses_float_statistics else plan
        fitting = fitting_micro_batch(passing, device_memory().num_bytes)
        if fitting is not None:
            plan = _calibrated(plain, skeleton, graph, layers, windows, most_windows=fitting)
    if read_weights:
        plan = plan.of_source(part_digests(variables, digests))
    return Planned(plan=plan, windows=windows, variables=variables)


def _calibrated(
    plan: Plan,
    skeleton: Skeleton,
    graph: BlockGraph,
    layers: Sequence[tuple[LayerPlan, ...]],
    windows: TokenWindows,
    *,
    most_windows: int | None = None,
) -> Plan:
    """The plan with its windows, and what they find out of the layers.

    Args:
        most_windows: of a micro-batch.

    Raises:
        PipelineError: the model cannot take the windows, or a layer cannot be calibrated.
    """
    layout = input_layout(skeleton)
    tokens = _tokens_plan(graph, layout, windows, most_windows)
    rest, *blocks = layers
    tokens = replace(tokens, held_back_every=held_back_every(plan.recipe, blocks, tokens))
    tuned = plan.recipe.tuning is not None
    groups, memory = input_groups(graph, layout, blocks, windows, tokens.micro_batch, tuned=tuned)
    captured: Groups = [()] * len(blocks)
    if plan.recipe.uses_float_statistics:
        captured, memory = captured_groups(
            plan.recipe, graph, layout, blocks, windows, tokens.micro_batch
        )
    if plan.device != "cpu":
        tokens = replace(
            tokens,
            attention=memory.attention,
            largest_array_bytes=memory.largest_array_bytes,
        )
    blocks, groups = with_folds(graph, layout, blocks, groups, windows, tokens.micro_batch)
    parts = _parts(skeleton, graph, [rest, *blocks], groups, captured)
    return replace(plan, tokens=tokens, parts=parts)


def _forward_dtype(skeleton: Skeleton, platform: str) -> Literal["float32", "bfloat16"]:
    """What the model is run in to calibrate it: on a GPU, bfloat16 where it is its own dtype.

    Then it is what the model is used in, and several times as fast. float16 overflows too easily,
    and a CPU is no faster with either.
    """
    own = base_policy(skeleton.backbone_json)
    return "bfloat16" if platform != "cpu" and own == "bfloat16" else "float32"


def _refuse_shared_blocks(skeleton: Skeleton, graph: BlockGraph) -> None:
    for block in graph.shared_blocks:
        raise SourceError(
            f"{skeleton.backbone.name}: {block.name} runs {len(block.calls)} times with the same "
            f"weights, so its layers have no single input to calibrate on; a "
            f"{type(skeleton.backbone).__name__} can be quantized by a recipe that needs no "
            "calibration: int8 or int4"
        )


def _tokens_plan(
    graph: BlockGraph, layout: InputLayout, windows: TokenWindows, most_windows: int | None
) -> TokensPlan:
    num_samples, sequence_length = windows.tokens.shape
    if not layout.takes_text:
        # As long as what enters the blocks.
        found = embedded_shapes(graph, layout, windows, 1)
        sequence_length = max(value.shape[1] for value in found.values() if len(value.shape) == 3)
    micro_batch, samples_per_shard = micro_batches(
        num_samples, sequence_length, jax.default_backend(), most_windows
    )
    return TokensPlan(
        key=windows.key,
        digest=windows.digest,
        fingerprint=windows.fingerprint,
        num_samples=num_samples,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        shards=shard_bounds(num_samples, samples_per_shard),
        sources=_sources(windows),
    )


def _sources(windows: TokenWindows) -> tuple[SourceTokens, ...]:
    if windows.source_of is None:
        return ()
    return tuple(
        SourceTokens(
            num_windows=int((windows.source_of == source).sum()),
            num_documents=num_documents,
            num_tokens=int(windows.lengths[windows.source_of == source].sum()),
        )
        for source, num_documents in enumerate(windows.source_documents)
    )


def _parts(
    skeleton: Skeleton,
    graph: BlockGraph,
    layers: Sequence[tuple[LayerPlan, ...]],
    groups: Groups,
    captured: Groups,
) -> tuple[PartPlan, ...]:
    in_blocks = {id(v) for block in graph.blocks for v in block.layer.weights}
    names = ["rest", *(block.name for block in graph.blocks)]
    variables = [[v for v in skeleton.backbone.weights if id(v) not in in_blocks]]
    variables += [block.layer.weights for block in graph.blocks]
    return tuple(
        PartPlan(
            part=part,
            name=name,
            source_bytes=sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in held),
            source_sha256="",
            layers=layers[part],
            groups=groups[part - 1] if part else (),
            captured=captured[part - 1] if part else (),
        )
        for part, (name, held) in enumerate(zip(names, variables, strict=True))
    )


def _task_name(
    skeleton: Skeleton, small_files: Mapping[str, bytes], policies: Mapping[str, str]
) -> str:
    """The class that the artifact's task.json will name; the backbone's if there is no task."""
    if skeleton.task is not None:
        return type(skeleton.task).__name__
    written = quantized_json(small_files, policies)
    return str(json.loads(written.get(TASK_FILE, written[CONFIG_FILE]))["class_name"])

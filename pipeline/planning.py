"""Make a plan: read the preset's JSON, build its skeleton, decide every layer's scheme.

Everything that can be refused is refused here, before any weight is read or byte written.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pipeline.calibration.texts import read_texts
from pipeline.calibration.windows import TokenWindows, make_windows, shard_bounds
from pipeline.errors import RecipeError
from pipeline.model.blocks import Block, BlockGraph, find_blocks
from pipeline.model.converted_files import converted_files
from pipeline.model.preset import PresetFiles
from pipeline.model.quantized_config import layer_policy, policy_map, quantized_json
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.model.stateless import call_with
from pipeline.model.targets import Target
from pipeline.model.tokenizer import model_inputs, preset_tokenizer
from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan, TokensPlan, micro_batches
from pipeline.recipe.recipe import (
    Calibration,
    Recipe,
    StatisticsKind,
    check_recipe,
    statistics_of,
)
from pipeline.weights.source import Source, open_source, values_digest
from pipeline.worker.block_program import BlockProgram
from quantizer import kernel_layout, row_slices
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Scheme

# What computes the result; another version may round otherwise.
_PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, and the token windows that it names."""

    plan: Plan
    windows: TokenWindows | None


def make_plan(preset: PresetFiles, recipe: Recipe, *, threads: int) -> Planned:
    """Decide everything about a run.

    Args:
        preset: the source.
        recipe: what is wanted.
        threads: of each worker's matrix products, which decide their rounding.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    skeleton = build_skeleton(preset)
    graph = find_blocks(skeleton)
    source = open_source(preset, skeleton)
    own = {id(layer) for layer in skeleton.backbone_layers}
    chosen = {
        target.path: _scheme_of(target, recipe, in_block=False)
        if id(target.layer) in own
        else (None, "part of the task, not of the backbone; left in float")
        for target in graph.rest_targets
    }
    for block in graph.blocks:
        for target in block.targets:
            chosen[target.path] = _scheme_of(target, recipe, in_block=True)
    _check(recipe, graph)
    policies = {path: layer_policy(scheme) for path, (scheme, _) in chosen.items() if scheme}
    # Refuses, by name, what Keras has no policy for.
    policy_map(_base_policy(skeleton), policies)
    # All weights are where they should be; their numbers are read below, part by part.
    source.variables()
    if preset.format == "huggingface":
        # What cannot be written at the end is refused at the beginning.
        converted_files(preset, skeleton)
    needs = any(statistics_of(scheme) for scheme, _ in chosen.values())
    # Reading and hashing leave a core to the tokenizer.
    beside = ThreadPoolExecutor(1, thread_name_prefix="digests")
    try:
        reading = [beside.submit(_digest, source, paths) for paths in _part_paths(source, graph)]
        windows = _windows(preset, skeleton, recipe) if needs else None
        digests = [one.result() for one in reading]
    finally:
        # Too little text is told before all of a large model is read.
        beside.shutdown(cancel_futures=True)
    tokens = None if windows is None else _tokens_plan(windows)
    plan = Plan(
        source_url=preset.url,
        source_files_sha256=source.files_digest(),
        model=type(skeleton.backbone).__name__,
        task=_task_name(skeleton, preset, policies),
        recipe=Recipe.model_validate(recipe.to_dict()),
        tokens=tokens,
        parts=_parts(skeleton, graph, digests, chosen, tokens),
        machine=machine(threads),
        versions=versions(),
        policies=policies,
        weights_format=2 if any(isinstance(s, Float8Scheme) for s, _ in chosen.values()) else 1,
    )
    return Planned(plan=plan, windows=windows)


def machine(threads: int) -> dict[str, str]:
    """The kind of machine that this process runs on: another may round otherwise."""
    return {
        "platform": jax.default_backend(),
        "device": str(jax.devices()[0].device_kind),
        "threads": str(threads),
    }


def versions() -> dict[str, str]:
    """Of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _scheme_of(target: Target, recipe: Recipe, *, in_block: bool) -> tuple[Scheme | None, str]:
    """A layer's scheme, or None with the reason where the recipe's cannot be had."""
    scheme = recipe.scheme_for(target.path, target.layer_kind)
    if scheme is None or target.layer_kind == "embedding":
        return scheme, ""
    if isinstance(scheme, GPTQScheme) and scheme.drift_correction:
        raise RecipeError(
            f"recipe {recipe.name}: drift_correction needs the float model's activations beside "
            "the quantized one's, which a run does not carry; set it to 0"
        )
    if statistics_of(scheme) and not in_block:
        return None, f"{scheme.mode} is calibrated inside blocks only; left in float"
    layout = kernel_layout(target.layer)
    if isinstance(scheme, GPTQScheme | AWQScheme) and (
        layout.batched or len(layout.shape) not in (2, 3)
    ):
        return None, f"stock Keras cannot store this kernel in {scheme.mode}; left in float"
    return scheme, ""


def _check(recipe: Recipe, graph: BlockGraph) -> None:
    targets = [*graph.rest_targets, *(target for b in graph.blocks for target in b.targets)]
    check_recipe(recipe, [(t.path, t.layer_kind, t.in_features) for t in targets])


def _base_policy(skeleton: Skeleton) -> str:
    return str(skeleton.backbone.dtype_policy.name)


def _windows(preset: PresetFiles, skeleton: Skeleton, recipe: Recipe) -> TokenWindows:
    assert recipe.calibration is not None
    return token_windows(preset, skeleton, recipe.calibration)


def token_windows(
    preset: PresetFiles, skeleton: Skeleton, calibration: Calibration
) -> TokenWindows:
    """Windows of texts in a preset's own tokens, with the special ones that it puts around them.

    Raises:
        PipelineError: no tokenizer, or texts that are missing, unreadable or too few.
    """
    most = most_tokens(skeleton)
    if most is not None and calibration.sequence_length > most:
        raise RecipeError(
            f"{preset.url}: the model has {most} positions, fewer than a window's "
            f"{calibration.sequence_length} tokens; set sequence_length to at most {most}"
        )
    texts = read_texts(calibration)
    tokenizer = preset_tokenizer(preset)
    special = tokenizer.special_ids
    wanted: dict[str, Any] = {}
    if "preprocessor.json" in preset.json_files:
        wanted = preset.parse("preprocessor.json").get("config", {})
    start = special.get("start", special.get("cls"))
    end = special.get("end", special.get("sep"))
    return make_windows(
        texts,
        tokenizer,
        calibration,
        start_token=start if wanted.get("add_start_token", True) else None,
        end_token=end,
        pad_token=special.get("pad", 0),
        vocabulary_size=getattr(skeleton.backbone, "vocabulary_size", None),
    )


def most_tokens(skeleton: Skeleton) -> int | None:
    """The longest sequence that a model has positions for; None where it sets no limit."""
    found = getattr(skeleton.backbone, "max_sequence_length", None)
    return found if isinstance(found, int) else None


def _tokens_plan(windows: TokenWindows) -> TokensPlan:
    num_samples, sequence_length = windows.tokens.shape
    micro_batch, samples_per_shard = micro_batches(
        num_samples, sequence_length, jax.default_backend()
    )
    return TokensPlan(
        key=windows.key,
        digest=windows.digest,
        fingerprint=windows.fingerprint,
        num_samples=num_samples,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        shards=shard_bounds(num_samples, samples_per_shard),
    )


def _part_paths(source: Source, graph: BlockGraph) -> list[tuple[str, ...]]:
    """Of the variables that no block holds, and of each block's."""
    blocks = [source.layer_paths(block.layer) for block in graph.blocks]
    return [source.rest_paths(graph), *blocks]


def _digest(source: Source, paths: Sequence[str]) -> str:
    return values_digest(source.read(paths))


def _parts(
    skeleton: Skeleton,
    graph: BlockGraph,
    digests: Sequence[str],
    chosen: Mapping[str, tuple[Scheme | None, str]],
    tokens: TokensPlan | None,
) -> tuple[PartPlan, ...]:
    in_blocks = {id(v) for block in graph.blocks for v in block.layer.weights}
    rest = [v for v in skeleton.backbone.weights if id(v) not in in_blocks]
    parts = [
        PartPlan(
            part=0,
            name="rest",
            source_bytes=_num_bytes(rest),
            source_sha256=digests[0],
            layers=(
                *_layer_plans(graph.rest_targets, chosen),
                *(_left(u.path, u.reason) for u in graph.rest_unsupported),
            ),
        )
    ]
    groups: dict[tuple[Any, ...], tuple[InputGroup, ...]] = {}
    for block in graph.blocks:
        wanted = {t.name: statistics_of(chosen[t.path][0]) for t in block.targets}
        kind = (block.signature, tuple(wanted.items()))
        if tokens is not None and kind not in groups:
            groups[kind] = _group_plans(graph, block, wanted, tokens)
        parts.append(
            PartPlan(
                part=block.index + 1,
                name=block.name,
                source_bytes=_num_bytes(block.layer.weights),
                source_sha256=digests[block.index + 1],
                layers=(
                    *_layer_plans(block.targets, chosen),
                    *(_left(u.path, u.reason) for u in block.unsupported),
                ),
                groups=groups.get(kind, ()),
            )
        )
    return tuple(parts)


def _layer_plans(
    targets: Sequence[Target], chosen: Mapping[str, tuple[Scheme | None, str]]
) -> list[LayerPlan]:
    plans = []
    for target in targets:
        scheme, note = chosen[target.path]
        plans.append(
            LayerPlan(
                path=target.path,
                name=target.name,
                kind=target.layer_kind,
                in_features=target.in_features,
                out_features=target.out_features,
                scheme=scheme,
                note=note,
                slices=_num_slices(target, scheme),
            )
        )
    return plans


def _num_slices(target: Target, scheme: Scheme | None) -> int:
    """Where Keras groups inputs otherwise than by the matrix's columns, a grid spans all rows."""
    if not isinstance(scheme, GPTQScheme) or target.layer_kind == "embedding":
        return 1
    layout = kernel_layout(target.layer)
    if not layout.keras_rows_are_inputs:
        return 1
    return len(row_slices(layout.out_features, layout.in_features))


def _left(path: str, reason: str) -> LayerPlan:
    return LayerPlan(
        path=path, name=path, kind="kernel", in_features=0, out_features=0, scheme=None, note=reason
    )


def _group_plans(
    graph: BlockGraph, block: Block, wanted: Mapping[str, StatisticsKind | None], tokens: TokensPlan
) -> tuple[InputGroup, ...]:
    shape = (tokens.micro_batch, tokens.sequence_length)
    example = model_inputs(graph.embed, np.zeros(shape, np.int32), np.ones(shape, bool))
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in graph.embed.weights]
    hidden_states, *side_inputs = jax.eval_shape(lambda v: _embed(graph, v, example), weights)
    return BlockProgram(block, wanted, hidden_states, side_inputs).groups


def _embed(graph: BlockGraph, values: Sequence[Any], inputs: Sequence[Any]) -> Any:
    return call_with(graph.embed, values, inputs)


def _task_name(skeleton: Skeleton, preset: PresetFiles, policies: Mapping[str, str]) -> str:
    """The class that the artifact's task.json will name."""
    if skeleton.task is not None:
        return type(skeleton.task).__name__
    written = quantized_json(preset.json_files, policies)["task.json"]
    return str(json.loads(written)["class_name"])


def _num_bytes(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in variables)

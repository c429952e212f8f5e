"""Plan a run: read the preset's JSON, build its skeleton, decide every layer's scheme.

Everything that can be refused is refused here, before any weight is read or byte written.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

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
from pipeline.model.targets import Target, Unsupported
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

# Packages that compute the result; other versions may round differently.
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
        recipe: the schemes and the calibration.
        threads: of each worker's matrix products, which decide their rounding.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be used.
    """
    skeleton = build_skeleton(preset)
    graph = find_blocks(skeleton)
    source = open_source(preset, skeleton)
    decisions = _decide(skeleton, graph, recipe)
    schemes = {path: scheme for path, (scheme, _) in decisions.items() if scheme is not None}
    policies = {path: layer_policy(scheme) for path, scheme in schemes.items()}
    # Refuses layers for which Keras has no policy.
    policy_map(str(skeleton.backbone.dtype_policy.name), policies)
    # Refuses sources that lack weights; their values are read part by part below.
    source.variables()
    if preset.format == "huggingface":
        # Refuses now what could not be written at the end.
        converted_files(preset, skeleton)
    calibration = recipe.calibration if any(map(statistics_of, schemes.values())) else None
    windows, digests = _read(preset, skeleton, source, graph, calibration)
    tokens = None if windows is None else _tokens_plan(windows)
    plan = Plan(
        source_url=preset.url,
        source_files_sha256=source.files_digest(),
        model=type(skeleton.backbone).__name__,
        task=_task_name(skeleton, preset, policies),
        recipe=Recipe.model_validate(recipe.to_dict()),
        tokens=tokens,
        parts=_parts(skeleton, graph, digests, decisions, tokens),
        machine=machine(threads),
        versions=versions(),
        policies=policies,
        weights_format=2 if any(isinstance(s, Float8Scheme) for s in schemes.values()) else 1,
    )
    return Planned(plan=plan, windows=windows)


def machine(threads: int) -> dict[str, str]:
    """The kind of machine that this process runs on; other kinds may round differently."""
    return {
        "platform": jax.default_backend(),
        "device": str(jax.devices()[0].device_kind),
        "threads": str(threads),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


class _Decision(NamedTuple):
    """A layer's scheme; None leaves it in float, and the note says why if the recipe does not."""

    scheme: Scheme | None
    note: str = ""


_Decisions: TypeAlias = Mapping[str, _Decision]
"""By layer path."""


def _decide(skeleton: Skeleton, graph: BlockGraph, recipe: Recipe) -> _Decisions:
    backbone_layers = {id(layer) for layer in skeleton.backbone_layers}
    in_blocks = [target for block in graph.blocks for target in block.targets]
    decisions = {}
    for target in graph.rest_targets:
        if id(target.layer) in backbone_layers:
            decisions[target.path] = _decide_layer(target, recipe, in_block=False)
        else:
            note = "part of the task, not of the backbone; left in float"
            decisions[target.path] = _Decision(None, note)
    for target in in_blocks:
        decisions[target.path] = _decide_layer(target, recipe, in_block=True)
    targets = [*graph.rest_targets, *in_blocks]
    check_recipe(recipe, [(t.path, t.layer_kind, t.in_features) for t in targets])
    return decisions


def _decide_layer(target: Target, recipe: Recipe, *, in_block: bool) -> _Decision:
    scheme = recipe.scheme_for(target.path, target.layer_kind)
    if scheme is None or target.layer_kind == "embedding":
        return _Decision(scheme)
    if isinstance(scheme, GPTQScheme) and scheme.drift_correction:
        raise RecipeError(
            f"recipe {recipe.name}: drift_correction needs the float model's activations beside "
            "the quantized one's, which a run does not carry; set it to 0"
        )
    if statistics_of(scheme) and not in_block:
        return _Decision(None, f"{scheme.mode} is calibrated inside blocks only; left in float")
    layout = kernel_layout(target.layer)
    if isinstance(scheme, GPTQScheme | AWQScheme) and (
        layout.batched or len(layout.shape) not in (2, 3)
    ):
        note = f"stock Keras cannot store this kernel in {scheme.mode}; left in float"
        return _Decision(None, note)
    return _Decision(scheme)


def _read(
    preset: PresetFiles,
    skeleton: Skeleton,
    source: Source,
    graph: BlockGraph,
    calibration: Calibration | None,
) -> tuple[TokenWindows | None, list[str]]:
    """The token windows, and the digest of each part's weights, read side by side."""
    paths = [source.rest_paths(graph), *(source.layer_paths(b.layer) for b in graph.blocks)]
    # One thread, to leave a core to the tokenizer.
    pool = ThreadPoolExecutor(1, thread_name_prefix="digests")
    try:
        digests = [pool.submit(_digest, source, of_part) for of_part in paths]
        windows = None
        if calibration is not None:
            windows = token_windows(preset, skeleton, calibration)
        return windows, [digest.result() for digest in digests]
    finally:
        # If the texts are too short, say so before all of a large model is read.
        pool.shutdown(cancel_futures=True)


def _digest(source: Source, paths: Sequence[str]) -> str:
    return values_digest(source.read(paths))


def token_windows(
    preset: PresetFiles, skeleton: Skeleton, calibration: Calibration
) -> TokenWindows:
    """Tokenize texts as the preset does, with its special tokens, and cut them into windows.

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
    preprocessor: dict[str, Any] = {}
    if "preprocessor.json" in preset.json_files:
        preprocessor = preset.parse("preprocessor.json").get("config", {})
    start = special.get("start", special.get("cls"))
    return make_windows(
        texts,
        tokenizer,
        calibration,
        start_token=start if preprocessor.get("add_start_token", True) else None,
        end_token=special.get("end", special.get("sep")),
        pad_token=special.get("pad", 0),
        vocabulary_size=getattr(skeleton.backbone, "vocabulary_size", None),
    )


def most_tokens(skeleton: Skeleton) -> int | None:
    """The number of positions that a model has; None if it sets no limit."""
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


def _parts(
    skeleton: Skeleton,
    graph: BlockGraph,
    digests: Sequence[str],
    decisions: _Decisions,
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
            layers=_layer_plans(graph.rest_targets, graph.rest_unsupported, decisions),
        )
    ]
    # Blocks of one signature and the same schemes have the same groups.
    groups: dict[tuple[Any, ...], tuple[InputGroup, ...]] = {}
    for block in graph.blocks:
        statistics = {t.name: statistics_of(decisions[t.path].scheme) for t in block.targets}
        key = (block.signature, tuple(statistics.items()))
        if tokens is not None and key not in groups:
            groups[key] = _input_groups(graph, block, statistics, tokens)
        parts.append(
            PartPlan(
                part=block.index + 1,
                name=block.name,
                source_bytes=_num_bytes(block.layer.weights),
                source_sha256=digests[block.index + 1],
                layers=_layer_plans(block.targets, block.unsupported, decisions),
                groups=groups.get(key, ()),
            )
        )
    return tuple(parts)


def _layer_plans(
    targets: Sequence[Target], unsupported: Sequence[Unsupported], decisions: _Decisions
) -> tuple[LayerPlan, ...]:
    quantizable = [
        LayerPlan(
            path=target.path,
            name=target.name,
            kind=target.layer_kind,
            in_features=target.in_features,
            out_features=target.out_features,
            scheme=decisions[target.path].scheme,
            note=decisions[target.path].note,
            slices=_num_slices(target, decisions[target.path].scheme),
        )
        for target in targets
    ]
    left_in_float = [
        LayerPlan(
            path=layer.path,
            name=layer.path,
            kind="kernel",
            in_features=0,
            out_features=0,
            scheme=None,
            note=layer.reason,
        )
        for layer in unsupported
    ]
    return (*quantizable, *left_in_float)


def _num_slices(target: Target, scheme: Scheme | None) -> int:
    if not isinstance(scheme, GPTQScheme) or target.layer_kind == "embedding":
        return 1
    layout = kernel_layout(target.layer)
    if not layout.keras_rows_are_inputs:
        # Keras groups these inputs otherwise, so that one grid spans all rows.
        return 1
    return len(row_slices(layout.out_features, layout.in_features))


def _input_groups(
    graph: BlockGraph,
    block: Block,
    statistics: Mapping[str, StatisticsKind | None],
    tokens: TokensPlan,
) -> tuple[InputGroup, ...]:
    shape = (tokens.micro_batch, tokens.sequence_length)
    inputs = model_inputs(graph.embed, np.zeros(shape, np.int32), np.ones(shape, bool))
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in graph.embed.weights]
    hidden_states, *side_inputs = jax.eval_shape(
        lambda values: call_with(graph.embed, values, inputs), weights
    )
    return BlockProgram(block, statistics, hidden_states, side_inputs).groups


def _task_name(skeleton: Skeleton, preset: PresetFiles, policies: Mapping[str, str]) -> str:
    """The class that the artifact's task.json will name."""
    if skeleton.task is not None:
        return type(skeleton.task).__name__
    written = quantized_json(preset.json_files, policies)["task.json"]
    return str(json.loads(written)["class_name"])


def _num_bytes(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in variables)

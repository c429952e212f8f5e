"""Decide every layer's scheme, and refuse what stock Keras could not load, or too little of."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

from pipeline.artifact.rehearsal import policies_of, rehearse
from pipeline.errors import RecipeError, SourceError
from pipeline.model.blocks import BlockGraph
from pipeline.model.inputs import input_layout
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import Skeleton
from pipeline.model.targets import Target, find_targets
from pipeline.plan import LayerPlan, Share
from pipeline.planning.input_groups import BlockUses, ExpertUse, block_uses
from pipeline.recipe.recipe import Recipe, check_recipe, statistics_of
from quantizer import kernel_layout, row_slices
from quantizer.errors import LayerError
from quantizer.experts import num_expert_ranges
from quantizer.keras_format.kernel_layout import row_groups
from quantizer.schemes import AWQScheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

_LEAST_SHARE = 0.5
_OTHER_USE = (
    "its block does not multiply each token's row with one matrix per expert of a known router; "
    "left in float"
)
_DRIFTING = (
    "no drift_correction for experts, to which the float model may send other tokens; solved "
    "without it"
)
_READ_APART = (
    "its block reads the kernel past the layer, and would take codes for weights; left in float"
)


def plan_layers(
    preset: PresetFiles, skeleton: Skeleton, graph: BlockGraph, recipe: Recipe
) -> tuple[list[tuple[LayerPlan, ...]], dict[str, str]]:
    """The layers of every part, and the dtype policies that the artifact's JSON has to name.

    Of each part, the layers that Keras can quantize come first, then others with matrices.

    Raises:
        PipelineError: a recipe that does not fit the model, or stock Keras could not load what it
            asks for.
    """
    _refuse_shared_layers(skeleton, graph)
    layers = _all_layers(skeleton, graph, recipe, block_uses(graph, input_layout(skeleton)))
    # Stock Keras loads experts as what they are dequantized to, in no format of its own.
    schemes = {one.path: one.scheme for of_part in layers for one in of_part if not one.experts}
    unreached = rehearse(preset, skeleton, schemes, [block.layer for block in graph.blocks])
    layers = [tuple(_reached(layer, unreached) for layer in of_part) for of_part in layers]
    return layers, policies_of(skeleton, schemes | dict.fromkeys(unreached))


def _refuse_shared_layers(skeleton: Skeleton, graph: BlockGraph) -> None:
    block_of: dict[int, str] = {}
    for block in graph.blocks:
        for target in block.targets:
            other = block_of.setdefault(id(target.layer), block.name)
            if other != block.name:
                model = type(skeleton.backbone).__name__
                raise SourceError(
                    f"{skeleton.backbone.name}: {other} and {block.name} hold the same layer, "
                    f"{target.path}, so that the blocks of a {model} cannot be told apart; only "
                    "models whose blocks have layers of their own can be quantized block by block "
                    "(docs/support.md lists them)"
                )


def check_share(preset: PresetFiles, recipe: Recipe, layers: Sequence[Sequence[LayerPlan]]) -> None:
    """Refuse a plan of less than half of the weights that its recipe asks for, if it may not be.

    Raises:
        RecipeError: says how much, why not the rest, and how to run it nevertheless.
    """
    every = [layer for of_part in layers for layer in of_part]
    share = Share.of(recipe, every).of_recipe
    if share >= _LEAST_SHARE or recipe.allow_partial:
        return
    left = [layer for layer in every if layer.note]
    largest = max(left, key=lambda layer: layer.num_weights)
    raise RecipeError(
        f"{preset.url}: recipe {recipe.name} would quantize {share:.0%} of the weights that it "
        f"asks for; most are in {largest.path} and its like ({largest.note}). If this is wanted, "
        "give --allow-partial, or allow_partial: true in the recipe or catalog; or leave these "
        "layers out by a rule with scheme: null"
    )


def _all_layers(
    skeleton: Skeleton, graph: BlockGraph, recipe: Recipe, uses: BlockUses
) -> list[tuple[LayerPlan, ...]]:
    in_encoders = {target.path for target in find_targets(graph.encoders, embeddings=True)}
    backbone_layers = {id(layer) for layer in skeleton.backbone_layers}
    parts = [(graph.rest_targets, graph.rest_unsupported)]
    parts += [(block.targets, block.unsupported) for block in graph.blocks]
    planned = []
    for part, (targets, unsupported) in enumerate(parts):
        layers = []
        for target in targets:
            in_backbone = part > 0 or id(target.layer) in backbone_layers
            scheme, note = _choose_scheme(target, recipe, in_backbone, in_block=part > 0)
            use = uses.experts.get(target.path)
            if scheme is not None and target.num_experts:
                scheme, note = _of_experts(scheme, use)
            if scheme is not None and target.path in uses.apart:
                scheme, note = None, _READ_APART
            if scheme is not None and target.path in in_encoders:
                scheme, note = _in_encoder(target, recipe, scheme)
            layers.append(
                LayerPlan(
                    path=target.path,
                    name=target.name,
                    kind=target.layer_kind,
                    in_features=target.in_features,
                    out_features=target.out_features,
                    scheme=scheme,
                    note=note,
                    slices=_num_slices(target, scheme, use),
                    experts=target.num_experts,
                    experts_per_token=0 if use is None else use.experts_per_token,
                )
            )
        layers += [
            LayerPlan(
                path=layer.path,
                name=layer.path,
                kind="kernel",
                in_features=0,
                out_features=0,
                scheme=None,
                note=layer.reason,
                # Tables and patches outside the blocks are no kernels that a recipe asks for.
                stacked_weights=layer.num_weights if part else 0,
            )
            for layer in unsupported
        ]
        planned.append(tuple(layers))
    check_recipe(
        recipe, [(t.path, t.layer_kind, t.in_features) for targets, _ in parts for t in targets]
    )
    return planned


def _choose_scheme(
    target: Target, recipe: Recipe, in_backbone: bool, in_block: bool
) -> tuple[Scheme | None, str]:
    """A layer's scheme; None leaves it in float, and the note says why if the recipe does not."""
    if not in_backbone:
        return None, "part of the task, not of the backbone; left in float"
    scheme = recipe.scheme_for(target.path, target.layer_kind)
    if scheme is None or target.layer_kind == "embedding":
        return scheme, ""
    if statistics_of(scheme) and not in_block:
        return None, f"{scheme.mode} is calibrated inside blocks only; left in float"
    if isinstance(scheme, GPTQScheme | AWQScheme) and not target.num_experts:
        try:
            row_groups(kernel_layout(target.layer), scheme, target.path)
        except LayerError:
            return None, f"stock Keras cannot store this kernel in {scheme.mode}; left in float"
    return scheme, ""


def _of_experts(scheme: Scheme, use: ExpertUse | None) -> tuple[Scheme | None, str]:
    """The scheme of a bank of experts, for which stock Keras has no format."""
    if use is None:
        return None, _OTHER_USE
    if not isinstance(scheme, GPTQScheme | Int8Scheme | Int4Scheme):
        return None, f"no {scheme.mode} for experts; left in float, give them gptq, int8 or int4"
    if isinstance(scheme, GPTQScheme) and scheme.drift_correction:
        return dataclasses.replace(scheme, drift_correction=0.0), _DRIFTING
    return scheme, ""


def _in_encoder(target: Target, recipe: Recipe, scheme: Scheme) -> tuple[Scheme | None, str]:
    """An encoder of images or sounds is small beside the blocks, and sensitive."""
    if target.layer_kind == "kernel" and recipe.rule_for(target.path) is not None:
        return scheme, ""
    return None, "part of an encoder beside the blocks, for which no rule asks; left in float"


def _reached(layer: LayerPlan, unreached: Container[str]) -> LayerPlan:
    if layer.path not in unreached:
        return layer
    note = "KerasHub does not hand the model's dtype on to it; left in float"
    return dataclasses.replace(layer, scheme=None, note=note, slices=1)


def _num_slices(target: Target, scheme: Scheme | None, use: ExpertUse | None) -> int:
    if not isinstance(scheme, GPTQScheme) or target.layer_kind == "embedding":
        return 1
    if use is not None and use.own_inputs:
        return num_expert_ranges(target.num_experts, target.in_features)
    if target.num_experts:
        return len(row_slices(target.axes.out_features, target.in_features))
    layout = kernel_layout(target.layer)
    # Otherwise Keras groups the inputs so that one grid spans all rows.
    in_slices = layout.keras_rows_are_inputs
    return len(row_slices(layout.out_features, layout.in_features)) if in_slices else 1

"""Rehearse an artifact: build, while planning, the model that stock Keras will build from it.

Whether KerasHub hands a format on to its layers, can build itself with them, and finds them again
in a process that built other models before, is known only once it has done so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

from pipeline.artifact.parts import cut_parts
from pipeline.errors import ArtifactError, SourceError
from pipeline.model.preset import PresetFiles
from pipeline.model.preset_json import base_policy, layer_policy, policy_map
from pipeline.model.skeleton import Skeleton, build_skeleton
from quantizer.schemes import Int8Scheme, Scheme


def policies_of(skeleton: Skeleton, schemes: Mapping[str, Scheme | None]) -> dict[str, str]:
    """The dtype policies that a preset has to request, by what Keras looks a layer up by.

    That is the layer's path. Where Keras generates a name in it, such as qwen_sparse_moe_block_1,
    the number counts what the process made before; Keras takes a key for a regular expression, and
    this one allows for any number.

    Args:
        schemes: of every layer of the backbone that holds matrices, by path; None if it stays in
            float.

    Raises:
        ArtifactError: a preset cannot request a scheme, or cannot tell two layers apart.
    """
    policies: dict[str, str] = {}
    first: dict[str, str] = {}
    for path, scheme in schemes.items():
        key = _key(path, skeleton.generated_names)
        policy = "" if scheme is None else layer_policy(scheme)
        if policies.setdefault(key, policy) != policy:
            raise ArtifactError(
                f"{first[key]} and {path} differ only in a number that Keras gives them, which is "
                f"another in every process, so that a preset cannot ask for "
                f"{policies[key] or 'float'} in one and {policy or 'float'} in the other; give "
                "both the same scheme"
            )
        first.setdefault(key, path)
    return {key: policy for key, policy in policies.items() if policy}


def _key(path: str, generated_names: frozenset[str]) -> str:
    names = path.split("/")
    if generated_names.isdisjoint(names):
        return path
    return "/".join(
        rf"{re.escape(re.sub(r'_[0-9]+$', '', name))}(_\d+)?"
        if name in generated_names
        else re.escape(name)
        for name in names
    )


def rehearse(
    preset: PresetFiles,
    skeleton: Skeleton,
    schemes: Mapping[str, Scheme | None],
    blocks: list[keras.layers.Layer],
) -> frozenset[str]:
    """Check that stock Keras makes the planned layers of the artifact, each with its variables.

    Args:
        skeleton: of the source, in its own dtype.
        schemes: as for `policies_of`.
        blocks: the source's.

    Returns:
        the paths of layers that stock KerasHub leaves in float, whatever a preset asks for.

    Raises:
        ArtifactError: stock Keras would not load the artifact, or load something else.
    """
    policies = policies_of(skeleton, schemes)
    base = base_policy(skeleton.backbone_json)
    try:
        quantized = build_skeleton(preset, policy_map(base, policies), many_made=True)
    except SourceError as error:
        raise _cannot_build(preset, skeleton, policies, base, error) from error
    wanted = {
        path: f"{layer_policy(scheme)}_from_{base}" for path, scheme in schemes.items() if scheme
    }
    unreached: set[str] = set()
    place: dict[int, int] = {}
    layers = quantized.backbone_layers
    for index, (source, layer) in enumerate(zip(skeleton.backbone_layers, layers, strict=True)):
        place[id(source)] = index
        found = _policy(layer)
        if found is None and source.path in wanted:
            unreached.add(source.path)
        elif found != wanted.get(source.path):
            raise ArtifactError(
                f"{source.path}: stock KerasHub would make it in {found}, where "
                f"{wanted.get(source.path, 'float')} is planned; give it the same scheme as "
                "the layers beside it"
            )
    if wanted and unreached >= wanted.keys():
        raise ArtifactError(
            f"{preset.url}: KerasHub's {type(skeleton.backbone).__name__} does not hand its dtype "
            "on to its layers, so that no preset of it can hold them quantized; it cannot be "
            "quantized until KerasHub does (docs/support.md lists what can)"
        )
    cut_parts(quantized.stored, [layers[place[id(block)]] for block in blocks])
    return frozenset(unreached)


def _policy(layer: keras.layers.Layer) -> str | None:
    """The name of the policy of a layer with quantized variables."""
    if getattr(layer, "quantization_mode", None) is None:
        return None
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    return str(policy.name)


def _cannot_build(
    preset: PresetFiles,
    skeleton: Skeleton,
    policies: Mapping[str, str],
    base: str,
    error: SourceError,
) -> ArtifactError:
    name, reason = type(skeleton.backbone).__name__, _innermost(error)
    if not _can_build(preset, policy_map(base, {})):
        return ArtifactError(
            f"{preset.url}: stock KerasHub cannot build a {name} of which any layer has a dtype of "
            f"its own ({reason}), so that no preset of it can hold quantized ones; it cannot be "
            "quantized until KerasHub can (docs/support.md lists what can)"
        )
    modes = sorted({policy.partition("/")[0] for policy in policies.values()})
    int8 = layer_policy(Int8Scheme())
    remedy = "leave its layers in float, by rules with scheme: null"
    if modes != [int8] and _can_build(preset, policy_map(base, dict.fromkeys(policies, int8))):
        # Experts, say, are not among them, and may keep their scheme.
        remedy = f"use int8, in which it can, for layers such as {next(iter(policies))}"
    return ArtifactError(
        f"{preset.url}: stock KerasHub cannot build a {name} with layers in {' and '.join(modes)} "
        f"({reason}); {remedy}"
    )


def _can_build(preset: PresetFiles, dtype: Mapping[str, Any]) -> bool:
    try:
        build_skeleton(preset, dtype)
    except SourceError:
        return False
    return True


def _innermost(error: SourceError) -> str:
    """What went wrong inside; Keras wraps it in a paragraph for each layer around."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    calls = [i for i, line in enumerate(lines) if line.startswith("Exception encountered when")]
    return lines[min(calls[-1] + 1, len(lines) - 1)] if calls else lines[0]

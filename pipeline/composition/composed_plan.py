"""The plan of an artifact that is made of blocks of finished runs.

The runs differ in nothing but their schemes, so that any of their blocks fit together. Each block
was solved on what the blocks before it gave in its own run; in the composition it meets what others
give. Part 0, which is outside the blocks, is the same in all of them, and the first run's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from pydantic import ConfigDict

from pipeline.errors import PipelineError
from pipeline.plan import LayersOrigin, PartOrigin, PartPlan, Plan, read_plan
from pipeline.recipe.recipe import Recipe, Rule
from pipeline.run.claim import differences
from pipeline.run.commits import read_manifest
from pipeline.run.records import Manifest, PartRecord
from pipeline.run.worker_api import LayersOfRun, PartsOfRuns
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import MAX_RECORD_BYTES, STRICT


@dataclass(frozen=True, kw_only=True)
class GivenRun:
    """A finished run that gives blocks.

    Attributes:
        store: opened at its root.
        records: of its parts, by number.
    """

    store: ObjectStore
    plan: Plan
    manifest: Manifest
    records: tuple[PartRecord, ...]

    @property
    def name(self) -> str:
        """That of its recipe."""
        return self.plan.recipe.name

    @property
    def size_bytes(self) -> int:
        """Of all parts."""
        return sum(map(part_bytes, self.records))

    def origin(self, part: int) -> PartOrigin:
        """What a composed plan says of a part that this run gives."""
        return PartOrigin(
            recipe=self.name,
            manifest_sha256=self.manifest.record_sha256,
            record_sha256=self.records[part].record_sha256,
        )


def part_bytes(record: PartRecord) -> int:
    """Of a part's weights, and of its codes if it has any."""
    return sum(file.size_bytes for file in record.files.values())


def read_given_run(store: ObjectStore) -> GivenRun:
    """Read a finished run's plan, manifest and records.

    Raises:
        MissingObjectError: it is not finished.
        DamagedObjectError: one of them cannot be read.
    """
    manifest = read_manifest(store)
    records = [
        PartRecord.from_json(store.get(key, sha256=digest, at_most=MAX_RECORD_BYTES))
        for key, digest in sorted(manifest.records.items())
    ]
    return GivenRun(
        store=store,
        plan=read_plan(store),
        manifest=manifest,
        records=tuple(sorted(records, key=lambda record: record.part)),
    )


def check_composable(runs: Sequence[GivenRun]) -> None:
    """Refuse runs that differ in more than their schemes, before anything is measured.

    Raises:
        PipelineError: names the two runs, and what differs.
    """
    for number, run in enumerate(runs):
        for earlier in runs[:number]:
            if run.manifest.record_sha256 == earlier.manifest.record_sha256:
                raise PipelineError(
                    f"{run.store.root_url} has the same result as {earlier.store.root_url}; name "
                    "each run once"
                )
    if len(runs) < 2:
        raise PipelineError("a composition takes blocks of at least two runs; name another one")
    check_plans([run.plan for run in runs], [run.store.root_url for run in runs])


def check_plans(plans: Sequence[Plan], names: Sequence[str]) -> None:
    """Refuse runs that differ in more than their schemes, by their plans alone.

    Args:
        names: of the runs, for messages.

    Raises:
        PipelineError: names the two runs, and what differs.
    """
    # Runs without calibration say nothing of how the others are calibrated.
    references = [0, *[n for n, plan in enumerate(plans) if plan.tokens is not None][:1]]
    for number, plan in enumerate(plans):
        for first in references:
            found = list(_differences(plans[first], plan))
            if found:
                raise PipelineError(
                    f"{names[number]} differs from {names[first]} in more than its scheme: "
                    f"{'; '.join(found)}; compose runs of one source, calibrated alike on one type "
                    "of machine"
                )
    check_names(plans)


def check_names(plans: Sequence[Plan]) -> None:
    """Refuse models of which a preset cannot name one block's layers without another's.

    Args:
        plans: of all runs of a composition.

    Raises:
        PipelineError: names two blocks.
    """
    keys = policy_keys(plans)
    block_of: dict[str, str] = {}
    for part in plans[0].parts:
        for key in {keys[layer.path] for layer in part.layers if layer.path in keys}:
            first = block_of.setdefault(key, part.name)
            if first != part.name and len({plan.policies.get(key) for plan in plans}) > 1:
                raise PipelineError(
                    f"{first} and {part.name} have layers that differ only in a number that Keras "
                    "gives them, which is another in every process, so that they cannot have "
                    "different schemes, and this model cannot be composed"
                )


def policy_keys(plans: Sequence[Plan]) -> dict[str, str]:
    """What Keras looks a layer's policy up by, for each layer that has one in any plan."""
    known = dict.fromkeys(key for plan in plans for key in plan.policies)
    paths = [layer.path for part in plans[0].parts for layer in part.layers]
    # Others are regular expressions, where Keras generates a name (see `rehearsal.policies_of`).
    patterns = {key: re.compile(key) for key in known if key not in set(paths)}
    keys = {}
    for path in paths:
        matches = (key for key, pattern in patterns.items() if pattern.fullmatch(path))
        key = path if path in known else next(matches, None)
        if key is not None:
            keys[path] = key
    return keys


def _differences(first: Plan, second: Plan) -> Iterable[str]:
    """What of two plans differs that must not, in words: names, and both values if short."""
    if first.source_digest != second.source_digest:
        yield f"other source ({second.source_url}, there {first.source_url})"
    if first.recipe.dtype != second.recipe.dtype:
        yield f"dtype {second.recipe.dtype}, there {first.recipe.dtype}"
    for name in ("model", "task"):
        if getattr(first, name) != getattr(second, name):
            yield f"{name} {getattr(second, name)}, there {getattr(first, name)}"
    if first.tokens is not None and second.tokens is not None:
        if first.tokens.digest != second.tokens.digest:
            yield (
                f"other calibration windows (SHA-256 {second.tokens.digest[:12]}, there "
                f"{first.tokens.digest[:12]})"
            )
        elif first.forward_dtype != second.forward_dtype:
            yield f"calibrated in {second.forward_dtype}, there in {first.forward_dtype}"
    theirs, ours = first.machine | first.versions, second.machine | second.versions
    yield from differences(theirs, ours, "{0} {2}, there {1}")
    outside = [
        [(layer.path, layer.scheme) for layer in plan.parts[0].layers] for plan in (first, second)
    ]
    if outside[0] != outside[1]:
        a, b = (dict(layers) for layers in outside)
        path = next(path for path in (*a, *b) if a.get(path) != b.get(path))
        schemes = [scheme.policy if scheme else "float" for scheme in (b.get(path), a.get(path))]
        yield f"{path}, outside the blocks, is {schemes[0]}, there {schemes[1]}"


@dataclass(frozen=True, kw_only=True)
class GivenLayers:
    """Layers of a block that another run gives than the rest of it.

    Attributes:
        block: its number.
        run: the number of the run.
        layers: paths: all layers of any run's input group, or none (see `layer_choice`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    block: int
    run: int
    layers: tuple[str, ...]


Pick: TypeAlias = tuple[tuple[int, ...], tuple[GivenLayers, ...]]
"""Of each block, the number of the run that gives it, but for layers that others give."""


def composed_plan(
    runs: Sequence[GivenRun],
    picked: Sequence[int],
    name: str,
    given_layers: Sequence[GivenLayers] = (),
) -> Plan:
    """The plan of a composition; that of one run, but for the origins, if it gives all blocks.

    Args:
        runs: as `check_composable` lets pass.
        picked: the number of the run that gives each block.
        name: of the composition's recipe.
        given_layers: what other runs give of blocks.
    """
    givers = [runs[number] for number in picked]
    if len(set(picked)) == 1 and not given_layers:
        only = givers[0]
        origins = tuple(only.origin(part.part) for part in only.plan.parts)
        return replace(only.plan, composed=origins, statistics_url="")
    by_part = (runs[0], *givers)
    others = {(one.block + 1, path): runs[one.run] for one in given_layers for path in one.layers}
    by_layer = [
        {layer.path: others.get((part, layer.path), run) for layer in run.plan.parts[part].layers}
        for part, run in enumerate(by_part)
    ]
    plans = [*(run.plan for run in by_part), *(runs[one.run].plan for one in given_layers)]
    # A block without calibration is the same wherever it stands. Of runs that are calibrated on the
    # quantized model and on the float one, the former's recipe allows all schemes.
    calibrated = min(
        (plan for plan in plans if plan.tokens is not None),
        key=lambda plan: plan.uses_float_statistics,
        default=None,
    )
    tunings = {plan.recipe.tuning for plan in plans[1:]}
    first = runs[0].plan
    parts = tuple(_part(number, run, by_layer[number]) for number, run in enumerate(by_part))
    rules = [rule for n, part in enumerate(parts) if n for rule in _rules(part, by_layer[n])]
    keys = policy_keys([run.plan for run in runs])
    policies = {
        keys[path]: run.plan.policies[keys[path]]
        for of_part in by_layer
        for path, run in of_part.items()
        if keys.get(path) in run.plan.policies
    }
    recipe: dict[str, Any] = first.recipe.to_dict() | {
        "name": name,
        "rules": [rule.model_dump(mode="json") for rule in rules],
        "calibration": None if calibrated is None else calibrated.recipe.to_dict()["calibration"],
        "allow_partial": any(plan.recipe.allow_partial for plan in plans),
        "servable": all(plan.recipe.servable for plan in plans),
    }
    # Of blocks that were tuned in several ways, or not all, the records say which were.
    [tuning] = tunings if len(tunings) == 1 else [None]
    recipe["tuning"] = None if tuning is None else tuning.model_dump(mode="json")
    return replace(
        first,
        recipe=Recipe.model_validate(recipe),
        tokens=None if calibrated is None else calibrated.tokens,
        forward_dtype=first.forward_dtype if calibrated is None else calibrated.forward_dtype,
        parts=parts,
        policies=policies,
        weights_format=max(plan.weights_format for plan in plans),
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
        composed=tuple(
            replace(
                run.origin(part),
                layers=tuple(
                    _layers_origin(runs[one.run].origin(part), one.layers)
                    for one in given_layers
                    if one.block + 1 == part
                ),
            )
            for part, run in enumerate(by_part)
        ),
        statistics_url="",
    )


def _layers_origin(of: PartOrigin, layers: tuple[str, ...]) -> LayersOrigin:
    return LayersOrigin(
        recipe=of.recipe,
        manifest_sha256=of.manifest_sha256,
        record_sha256=of.record_sha256,
        layers=layers,
    )


def _part(number: int, run: GivenRun, by_layer: Mapping[str, GivenRun]) -> PartPlan:
    """A part of a run, with the layers of others, and their inputs."""
    part = run.plan.parts[number]
    if all(giver is run for giver in by_layer.values()):
        return part
    planned = {
        id(giver): {layer.path: layer for layer in giver.plan.parts[number].layers}
        for giver in by_layer.values()
    }
    places = {layer.name: place for place, layer in enumerate(part.layers)}
    givers = {layer.name: by_layer[layer.path] for layer in part.layers}
    groups = [
        group
        for giver in {id(giver): giver for giver in by_layer.values()}.values()
        for group in giver.plan.parts[number].groups
        if all(givers[name] is giver for name in group.targets)
    ]
    return replace(
        part,
        layers=tuple(planned[id(by_layer[x.path])][x.path] for x in part.layers),
        groups=tuple(sorted(groups, key=lambda group: places[group.targets[0]])),
    )


def _rules(part: PartPlan, by_layer: Mapping[str, GivenRun]) -> Iterable[Rule]:
    """What the recipes of a block's layers ask for, as rules for this block alone."""
    wanted = {
        x.path: by_layer[x.path].plan.recipe.scheme_for(x.path, x.kind)
        for x in part.layers
        if x.kind == "kernel"
    }
    first = next(iter(wanted.values()), None)
    inside = all(path.startswith(f"{part.name}/") for path in wanted)
    if inside and all(scheme == first for scheme in wanted.values()):
        yield Rule(pattern=f"^{re.escape(part.name)}/", scheme=first)
        return
    for path, scheme in wanted.items():
        yield Rule(pattern=f"^{re.escape(path)}$", scheme=scheme)


def parts_of_runs(plan: Plan, runs: Sequence[GivenRun]) -> PartsOfRuns:
    """Where the parts of a composition's plan are, and the layers that others give of them."""
    urls = {run.manifest.record_sha256: run.store.root_url for run in runs}
    return PartsOfRuns(
        plan=plan,
        run_urls=tuple(urls[origin.manifest_sha256] for origin in plan.composed),
        layers=tuple(
            LayersOfRun(part=part, url=urls[one.manifest_sha256], layers=one.layers)
            for part, origin in enumerate(plan.composed)
            for one in origin.layers
        ),
    )

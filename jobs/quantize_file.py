"""`quantfleet quantize model.keras`: a plain Keras model, in one process of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.logging import is_json, log_event, print_json, set_run, status, url_name
from jobs.quantities import size
from jobs.reachable import absolute, check_writable, reachable
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.summary import left_in_float, schemes_table, summarized_schemes
from pipeline.errors import PipelineError, PlanMismatchError
from pipeline.executor.allocation import allocate, this_machine
from pipeline.executor.local_process import local_process
from pipeline.executor.protocol import ComputeSpec
from pipeline.executor.worker_environment import worker_environment
from pipeline.plain.plan import MODEL_KEY, PlainPlan, layer_records
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import plan_plain, quantize_plain
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY, LayerRecord, Manifest
from pipeline.storage.object_store import ObjectStore


def run_file(
    source_url: str,
    output_url: str,
    recipe: Recipe,
    spec: ComputeSpec,
    *,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Plan, quantize, write and report; a finished output is only reported.

    Raises:
        PipelineError, QuantizationError: a file, recipe, calibration or output that cannot be used.
    """
    source_url, output_url = absolute(source_url), absolute(output_url)
    set_run(run=url_name(output_url), model=url_name(source_url), recipe=recipe.name)
    store = reachable(output_url, MANIFEST_KEY)
    if not store.exists(MANIFEST_KEY):
        check_writable(store)
    _check_not_source(source_url, store)
    # It starts no workers: all of it happens in one process, on the CPU.
    allocation = allocate(dataclasses.replace(spec, workers=1), [this_machine(spec)])
    with local_process(worker_environment(allocation)) as process:
        with status("planning: reading the file, checking every layer and the calibration"):
            plan = process.run(plan_plain, source_url, recipe, allocation.threads)
        finished = read_manifest(store) if store.exists(MANIFEST_KEY) else None
        if finished is not None and finished.plan_digest != plan.digest:
            raise PlanMismatchError(
                f"{store.url(MANIFEST_KEY)}: another result is there, of another source, recipe, "
                "calibration or version; give another output"
            )
        if dry_run:
            _print_plan(plan, as_json=as_json)
            return
        if finished is not None:
            log_event("finished before", f"{output_url}: already complete; nothing to do")
            manifest = finished
        else:
            chosen = sum(layer.scheme is not None for layer in plan.layers)
            with status(f"quantizing {chosen} layers"):
                manifest = process.run(quantize_plain, plan, output_url)
        update_cards(store)
        update_report(store)
    _print_result(manifest, store, as_json=as_json)


def refuse_options(source: str, given: Mapping[str, object]) -> None:
    """Refuse options that mean nothing to a plain model.

    Args:
        given: their values, by name; false if they were not given.
    """
    for name, value in given.items():
        if value:
            raise PipelineError(
                f"{name} is for presets of KerasHub; {source} is a plain Keras model, which is "
                "calibrated on arrays (--inputs) in one process of this machine"
            )


def _check_not_source(source_url: str, store: ObjectStore) -> None:
    """Refuse to write over the source."""
    written = store.url(MODEL_KEY).removeprefix("file://")
    is_local = "://" not in written and "://" not in source_url
    same = Path(written).resolve() == Path(source_url).resolve() if is_local else False
    if same or written == source_url:
        raise PipelineError(
            f"{source_url}: the result would be written over the source; give another output"
        )


def _print_plan(plan: PlainPlan, *, as_json: bool) -> None:
    values = {
        "plan_digest": plan.digest,
        "source_bytes": plan.source_bytes,
        "quantized_share": plan.quantized_share,
        "unused_rules": list(plan.unused_rules),
        "layers": [dataclasses.asdict(layer) for layer in plan.layers],
    }
    if as_json:
        print_json(values | {"recipe": plan.recipe.to_dict()})
        return
    layers = Table("layer", "scheme", title=f"{plan.model}, plan {plan.digest[:12]}")
    for layer in plan.layers:
        scheme = "float" if layer.scheme is None else layer.scheme.policy
        layers.add_row(Text(layer.path), Text(scheme))
    facts = Table(show_header=False, box=None)
    facts.add_row("read", size(plan.source_bytes))
    facts.add_row("quantized", f"{plan.quantized_share:.1%} of the matrices' weights")
    notes = left_in_float({layer.path: layer.note for layer in plan.layers if layer.note})
    rules = (
        Text(f"rule without a layer: {name!r} matches none; is it mistyped?")
        for name in plan.unused_rules
    )
    log_event("planned", "", values, table=Group(layers, facts, *notes, *rules))


def _print_result(manifest: Manifest, store: ObjectStore, *, as_json: bool) -> None:
    layers = layer_records(manifest)
    stored = manifest.files[MODEL_KEY]
    provenance = manifest.provenance
    values: dict[str, Any] = {
        "plan_digest": manifest.plan_digest,
        "manifest_sha256": manifest.record_sha256,
        "model": provenance["model"],
        "source_bytes": provenance["source_bytes"],
        "stored_bytes": stored.size_bytes,
        "quantized_share": provenance["quantized_share"],
        "schemes": [dataclasses.asdict(row) for row in summarized_schemes(layers)],
        "layers": provenance["layers"],
        "left_in_float": {layer.path: layer.note for layer in layers if layer.note},
    }
    if as_json:
        print_json(values)
    if not as_json or is_json():
        log_event("finished", "", {"summary": values}, table=_result_table(values, layers))
        path = store.url(MODEL_KEY).removeprefix("file://")
        where = f"keras.models.load_model({path!r})"
        if "://" in path:
            where = f"copy {path} to a local folder, then keras.models.load_model(file)"
        log_event("loadable", f"load it:  {where}")


def _result_table(values: Mapping[str, Any], layers: tuple[LayerRecord, ...]) -> RenderableType:
    title = f"{values['model']}, plan {values['plan_digest'][:12]}"
    facts = Table(show_header=False, box=None)
    facts.add_row("file", f"{size(values['source_bytes'])} → {size(values['stored_bytes'])}")
    facts.add_row("quantized", f"{values['quantized_share']:.1%} of the matrices' weights")
    facts.add_row("manifest", f"sha256 {values['manifest_sha256']}")
    return Group(
        schemes_table(summarized_schemes(layers), title=title),
        facts,
        *left_in_float(values["left_in_float"]),
    )

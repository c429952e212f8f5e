"""A run's plan and its result as people read them: sizes, errors, quality, time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from jobs.expert_summary import ExpertSummary
from jobs.logging import log_event
from jobs.quality_rows import add_quality
from jobs.quantities import count, size
from jobs.tuning_summary import TuningSummary
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.fidelity import Fidelity
from pipeline.model.preset import PresetFiles
from pipeline.plan import LayerPlan, Plan, Share
from pipeline.planning.coverage import Coverage, faint_warnings
from pipeline.planning.estimates import Estimate
from pipeline.recipe.recipe import statistics_of
from pipeline.run.records import LayerRecord, Manifest, PartRecord
from pipeline.storage.object_store import ObjectStore
from pipeline.weights.weight_files import RangedFile
from quantizer.schemes import GPTQScheme


@dataclass(frozen=True, kw_only=True)
class SchemeSummary:
    """All layers of one scheme.

    Attributes:
        weight_error: mean ‖W - Ŵ‖ / ‖W‖.
        error_against_rtn: mean ratio of the output error to that of rounding to nearest; None
            without calibration.
        rounded: layers that kept rounding to nearest for some output channel.
        damped: layers whose damping had to be raised, or whose Hessian could not be factored.
    """

    scheme: str
    layers: int
    weight_error: float | None
    error_against_rtn: float | None
    rounded: int
    damped: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run's result.

    Attributes:
        source_bytes, stored_bytes, loaded_bytes: size of the weights in the source, in the
            artifact's files, and in memory once stock Keras has loaded them.
        block_bytes, embedding_bytes, rest_bytes: the three parts of `stored_bytes`.
        block_weights: elements of the blocks' matrices.
        share: how much of the model is quantized.
        wall_seconds: duration of this invocation without evaluation.
        seconds: worker seconds by stage in this invocation.
        flops: estimate of the plan.
        device_bytes: estimate of the most that a worker needs of its GPU; 0 on CPUs.
        device_peak_bytes: what it was in this invocation; None on CPUs, or if nothing was done.
        left_in_float: reason by layer path; layer_notes: what to know of a layer that was
            quantized.
        notes: the plan's.
        uncalibrated: why the layers that calibration gave nothing usable were rounded, by path.
        unseen_inputs: how many inputs were zero in all of calibration, by layer path.
        experts: None where none is quantized.
        coverage: what calibration showed of the model's inputs; None without texts, or where the
            token windows are no longer there, or damaged.
        faint_inputs: how many inputs had next to no energy in calibration, by layer path.
        warnings: where calibration showed too little.
        tuning: None where no block was to be trained.
    """

    plan_digest: str
    manifest_sha256: str
    model: str
    task: str
    source_bytes: int
    stored_bytes: int
    loaded_bytes: int
    block_bytes: int
    embedding_bytes: int
    rest_bytes: int
    block_weights: int
    share: Share
    schemes: tuple[SchemeSummary, ...]
    left_in_float: dict[str, str]
    layer_notes: dict[str, str]
    notes: tuple[str, ...]
    uncalibrated: dict[str, str]
    unseen_inputs: dict[str, int]
    experts: ExpertSummary | None
    wall_seconds: float
    seconds: dict[str, float]
    flops: float
    fidelity: Fidelity | None
    device_bytes: int = 0
    device_peak_bytes: int | None = None
    coverage: Coverage | None = None
    faint_inputs: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tuning: TuningSummary | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        store: ObjectStore,
        manifest: Manifest,
        costs: Estimate,
        seconds: Mapping[str, float],
        *,
        wall_seconds: float,
        fidelity: Fidelity | None,
        device_peak_bytes: int | None = None,
    ) -> Summary:
        """Summarize a finished run from its records."""
        records = [
            PartRecord.from_json(store.get(key, sha256=digest))
            for key, digest in sorted(manifest.records.items())
        ]
        layers = [layer for record in records for layer in record.layers]
        block_bytes = sum(record.size_bytes for record in records if record.part)
        outside = next(record for record in records if not record.part)
        embedding_bytes = _embedding_bytes(store, outside)
        coverage = _coverage(plan, store)
        faint = _faint_inputs(plan, layers)
        return cls(
            plan_digest=plan.digest,
            manifest_sha256=manifest.record_sha256,
            model=plan.model,
            task=plan.task,
            source_bytes=costs.source_bytes,
            stored_bytes=sum(record.size_bytes for record in records),
            loaded_bytes=sum(record.loaded_bytes for record in records),
            block_bytes=block_bytes,
            embedding_bytes=embedding_bytes,
            rest_bytes=outside.size_bytes - embedding_bytes,
            block_weights=sum(part.num_weights for part in plan.parts[1:]),
            share=plan.share,
            schemes=summarized_schemes(layers),
            left_in_float=layer_notes(layers, quantized=False),
            layer_notes=layer_notes(layers, quantized=True),
            notes=plan.notes,
            uncalibrated={
                layer.path: layer.account["reason"]
                for layer in layers
                if layer.account is not None
                and layer.scheme is not None
                and statistics_of(layer.scheme)
                and not layer.account["num_rows"]
            },
            unseen_inputs={
                layer.path: layer.account["dead_inputs"]
                for layer in layers
                if layer.account is not None and layer.account.get("dead_inputs")
            },
            experts=ExpertSummary.of(plan, records),
            wall_seconds=wall_seconds,
            seconds=dict(seconds),
            flops=costs.flops,
            device_bytes=costs.device_bytes,
            device_peak_bytes=device_peak_bytes,
            fidelity=fidelity,
            coverage=coverage,
            faint_inputs={path: number for path, (number, _) in faint.items()},
            warnings=(*([] if coverage is None else coverage.warnings()), *faint_warnings(faint)),
            tuning=TuningSummary.of([x.tuning for x in records if x.tuning is not None]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        quality = None if self.fidelity is None else self.fidelity.figures()
        coverage = None if self.coverage is None else self.coverage.to_dict()
        return dataclasses.asdict(self) | {"fidelity": quality, "coverage": coverage}


def _coverage(plan: Plan, store: ObjectStore) -> Coverage | None:
    def content() -> bytes:
        assert plan.tokens is not None
        return store.get(plan.tokens.key, sha256=plan.tokens.digest)

    try:
        return Coverage.read(plan, content)
    except MissingObjectError:
        return None
    except DamagedObjectError as error:
        # What was made of them is finished, and their digest was checked then.
        text = f"what calibration showed is left out of the summary: {error}"
        log_event("damaged", text, level=logging.WARNING)
        return None


def _faint_inputs(plan: Plan, layers: Iterable[LayerRecord]) -> dict[str, tuple[int, int]]:
    """How many inputs calibration hardly saw, and of how many, by layer path.

    Those of experts, who have inputs of their own, are not told of.
    """
    inputs = {x.path: x.in_features for part in plan.parts for x in part.layers if not x.experts}
    found = {}
    for layer in layers:
        number = 0 if layer.account is None else layer.account.get("faint_inputs", 0)
        if number and layer.path in inputs:
            found[layer.path] = (number, inputs[layer.path])
    return found


def _embedding_bytes(store: ObjectStore, record: PartRecord) -> int:
    """Bytes that embeddings take in a weights file; only the file's metadata is read.

    Raises:
        DamagedObjectError: the file is not HDF5.
    """
    import h5py  # slow to import, and needed only when a run is finished

    files = PresetFiles(
        url=store.root_url,
        format="keras",
        json_files={},
        sizes={record.file: record.size_bytes},
        store=store,
    )
    found: list[int] = []

    def add(path: str, item: h5py.Group | h5py.Dataset) -> None:
        # Keras names a layer's group after its class, such as reversible_embedding.
        if isinstance(item, h5py.Dataset) and "embedding" in path:
            found.append(item.id.get_storage_size())

    source = RangedFile(files, record.file)
    try:
        with h5py.File(source, "r") as file:
            file.visititems(add)
    except (OSError, RuntimeError) as error:
        raise source.failure or DamagedObjectError(
            f"{store.url(record.file)}: not valid HDF5 ({error})"
        ) from error
    return sum(found)


def summarized_schemes(layers: Sequence[LayerRecord]) -> tuple[SchemeSummary, ...]:
    """A summary for each scheme among layers, in the order of their first layers."""
    by_scheme: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        if layer.scheme is not None:
            by_scheme.setdefault(layer.scheme.policy, []).append(layer)
    return tuple(_summarized(name, members) for name, members in by_scheme.items())


def _summarized(name: str, layers: list[LayerRecord]) -> SchemeSummary:
    accounts = [layer.account for layer in layers if layer.account is not None]
    ratios = [
        account["output_error"] / account["rtn_output_error"]
        for account in accounts
        if account["rtn_output_error"]
    ]
    damped = [
        layer
        for layer in layers
        if isinstance(layer.scheme, GPTQScheme)
        and layer.account is not None
        and layer.account["damping"] != layer.scheme.hessian_damping
    ]
    return SchemeSummary(
        scheme=name,
        layers=len(layers),
        weight_error=_mean([account["weight_error"] for account in accounts]),
        error_against_rtn=_mean(ratios),
        rounded=sum(1 for account in accounts if "rtn" in account["kept"] and ratios),
        damped=len(damped),
    )


def schemes_table(schemes: Sequence[SchemeSummary], *, title: str) -> Table:
    """A row for each scheme."""
    figures = ("layers", "weight error", "output error / rounding's", "rounded", "damped more")
    table = Table("scheme", *(Column(name, justify="right") for name in figures), title=title)
    for row in schemes:
        table.add_row(
            row.scheme,
            str(row.layers),
            _number(row.weight_error),
            _number(row.error_against_rtn),
            str(row.rounded),
            str(row.damped),
        )
    return table


def summary_table(summary: Summary) -> RenderableType:
    """The summary as tables."""
    schemes = schemes_table(
        summary.schemes, title=f"{summary.model}, plan {summary.plan_digest[:12]}"
    )
    facts = Table(show_header=False, box=None)
    facts.add_row(
        "weights",
        f"{size(summary.source_bytes)} → {size(summary.stored_bytes)} stored, "
        f"{size(summary.loaded_bytes)} loaded",
    )
    facts.add_row("quantized", share_text(summary.share))
    bits = 8 * summary.block_bytes / max(summary.block_weights, 1)
    facts.add_row(
        "stored",
        f"{size(summary.stored_bytes)}: blocks {size(summary.block_bytes)} ({bits:.1f} bits a "
        f"weight), embeddings {size(summary.embedding_bytes)}, rest {size(summary.rest_bytes)}",
    )
    for name, text in summary.experts.rows() if summary.experts else ():
        facts.add_row(name, text)
    if lost := summary.uncalibrated:
        facts.add_row("not calibrated", f"{len(lost)} layers, the first {next(iter(lost))}")
        facts.add_row("", Text(next(iter(lost.values()))))
    if unseen := summary.unseen_inputs:
        facts.add_row(
            "never seen",
            f"{sum(unseen.values())} inputs of {len(unseen)} layers were zero in all of "
            "calibration: their weights are rounded to nearest",
        )
    if faint := summary.faint_inputs:
        most = max(faint, key=lambda path: (faint[path], path))
        facts.add_row(
            "hardly seen",
            f"{sum(faint.values())} inputs of {len(faint)} layers had next to no energy in "
            f"calibration; most of them, {faint[most]}, in {most}",
        )
    if summary.tuning is not None:
        facts.add_row("tuned", summary.tuning.text)
    if summary.coverage is not None:
        facts.add_row("calibrated on", summary.coverage.text)
    if summary.fidelity is not None:
        add_quality(facts, summary.fidelity)
    if summary.seconds:
        stages = ", ".join(f"{name} {value:.1f}" for name, value in summary.seconds.items())
        facts.add_row("seconds", f"{summary.wall_seconds:.1f} in all; by stage: {stages}")
        work = sum(summary.seconds.values())
        if summary.flops and work:
            facts.add_row(
                "flops", f"{count(summary.flops)}, {count(summary.flops / work)} a second"
            )
    if summary.device_peak_bytes is not None:
        facts.add_row(
            "peak of a GPU",
            f"{size(summary.device_peak_bytes)} of about {size(summary.device_bytes)} estimated",
        )
    facts.add_row("manifest", f"sha256 {summary.manifest_sha256}")
    notes = [
        *left_in_float(summary.left_in_float),
        *with_examples(summary.layer_notes),
        *map(Text, summary.notes),
        *(Text(f"warning: {text}") for text in summary.warnings),
    ]
    return Group(schemes, facts, *notes)


def share_text(share: Share) -> str:
    """A share in words."""
    return (
        f"{share.of_model:.1%} of the model's weights, {share.of_recipe:.1%} of those that the "
        "recipe asks for"
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def left_in_float(reasons: Mapping[str, str]) -> list[Text]:
    """Each reason once, with a layer that it applies to."""
    # Some reasons repeat what these lines begin with.
    plain = {path: reason.removesuffix("; left in float") for path, reason in reasons.items()}
    return [Text("left in float: ").append(line) for line in with_examples(plain)]


def with_examples(notes: Mapping[str, str]) -> list[Text]:
    """Each note once, with a layer that it applies to."""
    examples = {note: path for path, note in notes.items()}
    return [Text(f"{path}: {note}") for note, path in examples.items()]


def layer_notes(layers: Iterable[LayerPlan | LayerRecord], *, quantized: bool) -> dict[str, str]:
    """The notes of layers that were quantized, or of those that were not, by layer path."""
    return {
        layer.path: layer.note
        for layer in layers
        if layer.note and (layer.scheme is not None) == quantized
    }

"""What each layer's quantization cost, as a report shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.release.contents import FinishedRun
from pipeline.plan import Plan
from pipeline.run.records import LayerRecord, PartRecord
from pipeline.storage.record import MAX_RECORD_BYTES


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One quantized layer.

    Attributes:
        block: index of its block; None outside the blocks.
        name: the layer's path within its block; its whole path outside.
        output_error: twice the mean squared error of the layer's output on the calibration inputs,
            summed over output channels; None where the scheme needs no calibration.
        rounded_output_error: the same of rounding to nearest.
        weight_error: ‖W - Ŵ‖ / ‖W‖.
        account: what the solver says of it (see docs/reference.md).
        damping: that the recipe asks for; None where the scheme has none.
    """

    block: int | None
    name: str
    path: str
    scheme: str
    output_error: float | None
    rounded_output_error: float | None
    weight_error: float | None
    account: dict[str, Any]
    damping: float | None = None

    @property
    def of_rounding(self) -> float | None:
        """The output error as a share of what rounding to nearest leaves."""
        if self.output_error is None or not self.rounded_output_error:
            return None
        return self.output_error / self.rounded_output_error

    @property
    def rank(self) -> tuple[bool, float]:
        """Greater for a layer that lost more, by its outputs or else by its weights."""
        error = self.weight_error if self.output_error is None else self.output_error
        return self.output_error is not None, 0.0 if error is None else error


def layer_errors(plan: Plan | None, records: Iterable[PartRecord]) -> tuple[LayerError, ...]:
    """All quantized layers, in the model's order.

    Args:
        plan: names the blocks.
        records: of the plan's parts.
    """
    found: list[LayerError] = []
    for record in sorted(records, key=lambda one: one.part):
        block = record.part - 1 if record.part else None
        prefix = f"{plan.parts[record.part].name}/" if plan is not None and record.part else ""
        found += (_error(one, block, prefix) for one in record.layers if one.scheme is not None)
    return tuple(found)


def read_records(run: FinishedRun) -> list[PartRecord]:
    """The records of a finished run's parts; none of a plain Keras model.

    Raises:
        DamagedObjectError: one is damaged.
    """
    if run.plan is None:
        return []
    return [
        PartRecord.from_json(run.store.get(key, sha256=digest, at_most=MAX_RECORD_BYTES))
        for key, digest in sorted(run.manifest.records.items())
    ]


def errors_of(run: FinishedRun, records: Sequence[PartRecord]) -> tuple[LayerError, ...]:
    """All quantized layers of a finished run, in the model's order."""
    return layer_errors(run.plan, records) if records else errors_outside_blocks(run.layers)


def errors_outside_blocks(layers: Iterable[LayerRecord]) -> tuple[LayerError, ...]:
    """All quantized layers of a model that is not divided into blocks."""
    return tuple(_error(one, None, "") for one in layers if one.scheme is not None)


def _error(layer: LayerRecord, block: int | None, prefix: str) -> LayerError:
    account = layer.account or {}
    calibrated = bool(account.get("num_rows"))
    assert layer.scheme is not None
    return LayerError(
        block=block,
        name=layer.path.removeprefix(prefix),
        path=layer.path,
        scheme=layer.scheme.policy,
        output_error=account.get("output_error") if calibrated else None,
        rounded_output_error=account.get("rtn_output_error") if calibrated else None,
        weight_error=account.get("weight_error"),
        account=account,
        damping=getattr(layer.scheme, "hessian_damping", None),
    )


def remarks(layers: Sequence[LayerError]) -> list[str]:
    """In words, what went otherwise than a recipe asks: layers damped more, or only rounded."""
    found = []
    damped = [
        one
        for one in layers
        if one.damping is not None and one.damping < (one.account.get("damping") or 0)
    ]
    if damped:
        most = max(one.account["damping"] for one in damped)
        found.append(
            f"{_layers(damped)} more damping than the recipe asks for, up to {most:g}, since their "
            "inputs are too alike to be told apart"
        )
    rounded = [one for one in layers if one.damping and one.account.get("kept") == "rtn"]
    if rounded:
        found.append(
            f"{_layers(rounded)} rounding to nearest instead of GPTQ, in all their output channels"
        )
    dead = [one for one in layers if one.account.get("dead_inputs")]
    if dead:
        inputs = sum(one.account["dead_inputs"] for one in dead)
        found.append(
            f"{_layers(dead)} inputs that calibration never showed, {inputs} in all, whose weights "
            "were rounded to nearest"
        )
    return found


def _layers(layers: Sequence[LayerError]) -> str:
    first = layers[0].path
    return f"{first} has" if len(layers) == 1 else f"{len(layers)} layers, such as {first}, have"


def worst(layers: Sequence[LayerError], number: int) -> tuple[LayerError, ...]:
    """Those that lost most, the worst first; of equals, the first in the model."""
    return tuple(sorted(layers, key=lambda one: one.rank, reverse=True)[:number])

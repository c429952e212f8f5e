"""What a run is to make of experts, and what it made of them: codes, and tokens that reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from jobs.quantities import count, size
from pipeline.plan import Plan
from pipeline.planning.estimates import Estimate
from pipeline.run.records import PartRecord


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """All quantized experts of a run.

    Attributes:
        codes_bytes: of the files of codes.
        num_weights: of the experts.
        tokens: of calibration, that reached an expert with inputs of its own: the least, the
            median of the banks' medians, and the most; None without calibration.
        experts: with inputs of their own.
        below_floor: of these, how many were reached by so few tokens that more would help.
        rounded: of these, how many could not be calibrated; first_rounded: one of them, and why.
    """

    codes_bytes: int
    num_weights: int
    tokens: tuple[int, int, int] | None
    experts: int
    below_floor: int
    rounded: int
    first_rounded: str = ""

    @classmethod
    def of(cls, plan: Plan, records: Sequence[PartRecord]) -> Self | None:
        """None of a run without quantized experts."""
        layers = [layer for part in plan.parts for layer in part.layers]
        banks = {layer.path: layer for layer in layers if layer.experts and layer.scheme}
        if not banks:
            return None
        reached: list[tuple[str, dict[str, Any]]] = [
            (layer.path, layer.account["experts"])
            for record in records
            for layer in record.layers
            if layer.account is not None and "experts" in layer.account
        ]
        tokens = [account["tokens"] for _, account in reached]
        medians = sorted(median for _, median, _ in tokens)
        rounded = [
            (path, number, reason)
            for path, account in reached
            for reason, numbers in account["rounded"].items()
            for number in numbers
        ]
        return cls(
            codes_bytes=sum(record.codes.size_bytes for record in records if record.codes),
            num_weights=sum(layer.num_weights for layer in banks.values()),
            tokens=(
                min(least for least, _, _ in tokens),
                medians[(len(medians) - 1) // 2],
                max(most for _, _, most in tokens),
            )
            if tokens
            else None,
            experts=sum(banks[path].experts for path, _ in reached),
            below_floor=sum(account["below_floor"] for _, account in reached),
            rounded=len(rounded),
            first_rounded="expert {1} of {0}: {2}".format(*rounded[0]) if rounded else "",
        )

    def rows(self) -> list[tuple[str, str]]:
        """For people: names and what to know."""
        bits = 8 * self.codes_bytes / self.num_weights
        rows = [
            (
                "experts",
                f"codes {size(self.codes_bytes)} ({bits:.1f} bits a weight) in codes/, for "
                "exports; stock KerasHub loads experts as float",
            )
        ]
        if self.tokens is not None:
            least, median, most = self.tokens
            text = f"least {least:,}, median {median:,}, most {most:,}"
            if self.below_floor:
                text += (
                    f"; {self.below_floor} of {self.experts} had fewer than four for each input: "
                    "more calibration would help"
                )
            if self.rounded:
                text += f"; {self.rounded} were rounded to nearest, the first {self.first_rounded}"
            rows.append(("tokens an expert", text))
        return rows


def planned_experts(plan: Plan, costs: Estimate) -> list[tuple[str, str]]:
    """For people, before a run: names and what to know; nothing of a model without experts."""
    layers = [layer for part in plan.parts for layer in part.layers if layer.experts]
    if not layers:
        return []
    chosen = {(layer.experts, layer.experts_per_token) for layer in layers}
    numbers = ", ".join(f"{used or 'some'} of {number}" for number, used in sorted(chosen))
    rows = [
        (
            "weights",
            f"{count(costs.weights)}, of which a token needs {count(costs.active_weights)} "
            f"({numbers} experts)" + ("" if plan.device == "cpu" else "; GPUs compute it by all"),
        )
    ]
    if costs.codes_bytes:
        text = f"codes {size(costs.codes_bytes)}, about, beside weights that hold experts as float"
        rows.append(("experts", text))
    if (tokens := plan.tokens) is not None and costs.advised_tokens:
        text = f"about {costs.tokens_per_expert:,} of calibration on average"
        if tokens.num_samples * tokens.sequence_length < costs.advised_tokens:
            enough = -(-costs.advised_tokens // tokens.sequence_length)
            text += (
                f"; {costs.advised_tokens:,} tokens in all would do for most (num_samples: "
                f"{enough}), with fewer the correlations between inputs count for less"
            )
        rows.append(("tokens an expert", text))
    return rows

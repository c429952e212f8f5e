"""What the steps of `make check-gpu` found, beside what it should be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GIB = 1 << 30
_NOT_A_GPU = "not a GPU"
_WIDEST = 60


@dataclass(frozen=True)
class Verdict:
    """One line of the table.

    Attributes:
        passed: None where there is no bar, or none on this device.
    """

    what: str
    found: str
    expected: str = ""
    passed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(found: dict[str, Any], folder: Path, *, on_gpu: bool) -> list[Verdict]:
    """Judge what the steps found so far.

    Args:
        found: of each step, by its name.
        folder: where they left arrays.
        on_gpu: whether bars of speed and memory hold.
    """
    verdicts = [
        Verdict(name, str(one["failed"]), "no failure", passed=False)
        if "failed" in one
        else Verdict(name, f"skipped: {one['skipped']}")
        for name, one in found.items()
        if "failed" in one or "skipped" in one
    ]
    facts = found.get("facts", {})
    if "platform" in facts:
        flags = facts["machine"].get("XLA_FLAGS", "none")
        text = f"{facts['machine']['device']}, XLA's flags: {flags}"
        right = facts["platform"] == "gpu" if on_gpu else None
        verdicts.append(Verdict("computes on", text, "a GPU" if on_gpu else _NOT_A_GPU, right))
    return [
        *verdicts,
        *_against_cpu(found, folder, on_gpu=on_gpu),
        *_otherwise(found.get("codes 1", {})),
        *_same(
            found,
            "codes in two processes",
            ["codes 1", "codes 2"],
            ["gram", "pivots", *_codes_names()],
        ),
        *_same(found, "run in two processes", ["pair bfloat16 1", "pair bfloat16 2"], ["files"]),
        *_same(
            found,
            "run on all GPUs and on one",
            ["pair bfloat16 1", "pair bfloat16 on one GPU"],
            ["files"],
        ),
        *_speed(found.get("speed", {}), on_gpu=on_gpu),
        *(
            verdict
            for name in ("pair bfloat16 1", "pair float32 1")
            for verdict in _pair(name, found.get(name, {}), on_gpu=on_gpu)
        ),
    ]


def _codes_names() -> list[str]:
    return ["codes, 4 bits", "codes, 3 bits"]


def _against_cpu(found: dict[str, Any], folder: Path, *, on_gpu: bool) -> list[Verdict]:
    cpu, other = found.get("codes cpu", {}), found.get("codes 1", {})
    if "codes, 3 bits" not in cpu or "codes, 3 bits" not in other:
        return []

    def arrays(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        left, right = (np.load(folder / f"codes-{place}" / f"{name}.npy") for place in ("cpu", "1"))
        return left, right

    def judged(what: str, text: str, bar: str, passed: bool) -> Verdict:
        return Verdict(what, text, bar, passed) if on_gpu else Verdict(what, text, _NOT_A_GPU)

    verdicts = []
    for name, bar in (("gram", 1e-5), ("pivots", 1e-3)):
        left, right = arrays(name)
        off = float(np.linalg.norm(left - right) / np.linalg.norm(left))
        verdicts.append(judged(f"{name} against the CPU's", f"{off:.1e}", f"≤ {bar}", off <= bar))
    for bits in (4, 3):
        left, right = arrays(f"codes{bits}")
        same = float((left == right).mean())
        verdicts.append(Verdict(f"codes as the CPU's, {bits} bits", f"{same:.2%}"))
        ratio = other[f"output error, {bits} bits"] / cpu[f"output error, {bits} bits"]
        what = f"output error by the CPU's, {bits} bits"
        verdicts.append(judged(what, f"{ratio:.4f}", "1 ± 0.01", abs(ratio - 1) <= 0.01))
    return verdicts


def _otherwise(found: dict[str, Any]) -> list[Verdict]:
    meanings = {
        "decoded otherwise": "decoded to other bits than on the host",
        "solved otherwise": "rows that get other bits in other company",
    }
    texts = {
        what: ", ".join(found[name]) or "none" for name, what in meanings.items() if name in found
    }
    return [Verdict(what, text, "none", text == "none") for what, text in texts.items()]


def _same(found: dict[str, Any], what: str, steps: list[str], names: list[str]) -> list[Verdict]:
    one, two = (found.get(step, {}) for step in steps)
    if any(name not in values for name in names for values in (one, two)):
        return []
    other = [name for name in names if one[name] != two[name]]
    text = "the same bytes" if not other else f"other bytes: {', '.join(other)}"
    return [Verdict(what, text, "the same bytes", not other)]


def _speed(found: dict[str, Any], *, on_gpu: bool) -> list[Verdict]:
    verdicts = []
    for shape, one in found.items():
        if not isinstance(one, dict):
            continue
        text = f"{one['then']:.3f} s ({one['first']:.1f} s the first time)"
        what = f"solving {shape}, two sweeps"
        if shape == "4096 × 4096":
            verdicts.append(_bar(what, text, one["then"], 0.4, 0.15, "s", on_gpu=on_gpu))
        else:
            verdicts.append(Verdict(what, text, "" if on_gpu else _NOT_A_GPU))
    return verdicts


def _pair(name: str, found: dict[str, Any], *, on_gpu: bool) -> list[Verdict]:
    if "files" not in found:
        return []
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in found["stage_seconds"].items())
    verdicts = [
        Verdict(f"{name}: computed in", f"{found['forward']}, attention: {found['attention']}"),
        Verdict(
            f"{name}: seconds",
            f"{found['process_seconds']:.1f} in all, {found['block_seconds']:.2f} for the second "
            f"block; by stage: {stages}",
        ),
    ]
    model = found["model_seconds"]
    text = f"{model:.0f} s"
    if name.startswith("pair bfloat16"):
        what = f"{name}: 32 such blocks"
        verdicts.append(_bar(what, text, model, 250, 120, "s", on_gpu=on_gpu))
    peak, estimated = found["device_peak_bytes"], found["estimated_device_bytes"]
    if peak is None:
        verdicts.append(Verdict(f"{name}: peak of device memory", "unknown", _NOT_A_GPU))
    else:
        text = f"{peak / _GIB:.1f} GiB, {peak / estimated:.0%} of the estimate"
        what = f"{name}: peak of device memory"
        verdicts.append(Verdict(what, text, "≤ 100% of the estimate", peak <= estimated))
    return verdicts


def _bar(
    what: str, text: str, value: float, bar: float, goal: float, unit: str, *, on_gpu: bool
) -> Verdict:
    if not on_gpu:
        return Verdict(what, text, _NOT_A_GPU)
    return Verdict(what, text, f"≤ {bar:g} {unit}, better {goal:g} {unit}", value <= bar)


def table(card: str, verdicts: list[Verdict]) -> str:
    """For people."""
    marks = {True: "pass", False: "FAIL", None: ""}
    rows = [(marks[x.passed], x.what, x.found, x.expected) for x in verdicts]
    widths = [min(max((len(row[i]) for row in rows), default=0), _WIDEST) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join([f"GPU: {card}", *(line.rstrip() for line in lines)])

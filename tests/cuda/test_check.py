"""`make check-gpu` on a CPU: every step runs, and the table says what it is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda import steps
from tests.cuda.check import Check, Found, Step, carry_out, main
from tests.cuda.verdict import Verdict, judge, table


def step(name: str, *, seconds: float, found: Found | None = None) -> Step:
    def run(_: float) -> Found:
        return found or {"done": name}

    return Step(name=name, run=run, least_seconds=seconds, most_seconds=seconds)


def test_a_step_without_time_is_skipped_and_every_step_is_told_of() -> None:
    told: list[list[str]] = []
    found = carry_out(
        [step("first", seconds=1), step("long", seconds=100), step("last", seconds=1)],
        50,
        lambda found: told.append(list(found)),
    )
    assert told == [["first"], ["first", "long"], ["first", "long", "last"]]
    assert found["long"] == {"skipped": "50 s left, and it needs 100"}
    assert found["last"]["done"] == "last"
    [verdict] = judge({"long": found["long"]}, Path(), on_gpu=True)
    assert (verdict.what, verdict.passed) == ("long", None)
    assert "50 s left" in verdict.found


def codes(folder: Path, name: str, *, error: float, gram: float) -> Found:
    place = folder / f"codes-{name}"
    place.mkdir()
    for array in ("gram", "pivots", "codes4", "codes3"):
        np.save(place / f"{array}.npy", np.full((4, 4), gram if array == "gram" else 1.0))
    errors = {f"output error, {bits} bits": error for bits in (4, 3)}
    return errors | dict.fromkeys(("gram", "pivots", "codes, 4 bits", "codes, 3 bits"), str(gram))


def pair(files: str, *, peak: int | None, seconds: float) -> Found:
    return {
        "files": {"model_00001.weights.h5": files},
        "process_seconds": seconds,
        "block_seconds": 2.0,
        "model_seconds": seconds + 60,
        "stage_seconds": {"solve": 1.0},
        "forward": "bfloat16",
        "attention": "cudnn",
        "estimated_device_bytes": 100,
        "device_peak_bytes": peak,
    }


def failed(verdicts: list[Verdict]) -> list[str]:
    return [verdict.what for verdict in verdicts if verdict.passed is False]


def test_a_gpu_that_is_right_passes_and_each_fault_is_named(tmp_path: Path) -> None:
    good = {
        "facts": {"platform": "gpu", "machine": {"device": "NVIDIA H100"}},
        "codes cpu": codes(tmp_path, "cpu", error=0.1, gram=1.0),
        "codes 1": codes(tmp_path, "1", error=0.1005, gram=1.000001),
        "speed": {"4096 × 4096": {"first": 9.0, "then": 0.2}, "step_seconds": 12.0},
        "pair bfloat16 1": pair("a", peak=90, seconds=100),
        "pair bfloat16 2": pair("a", peak=90, seconds=100),
    }
    good["codes 2"] = dict(good["codes 1"])
    good["pair bfloat16 on one GPU"] = pair("a", peak=90, seconds=100)
    verdicts = judge(good, tmp_path, on_gpu=True)
    assert failed(verdicts) == []
    assert len([verdict for verdict in verdicts if verdict.passed]) >= 10
    faults: dict[str, tuple[str, Any]] = {
        "computes on": ("facts", {"platform": "cpu", "machine": {"device": "cpu"}}),
        "output error by the CPU's, 4 bits": (
            "codes 1",
            good["codes 1"] | {"output error, 4 bits": 0.102},
        ),
        "codes in two processes": ("codes 2", good["codes 2"] | {"gram": "other"}),
        "run in two processes": ("pair bfloat16 2", pair("b", peak=90, seconds=100)),
        "run on all GPUs and on one": (
            "pair bfloat16 on one GPU",
            pair("b", peak=90, seconds=100),
        ),
        "solving 4096 × 4096, two sweeps": (
            "speed",
            {"4096 × 4096": {"first": 9.0, "then": 0.5}},
        ),
        "pair bfloat16 1: 32 such blocks": (
            "pair bfloat16 1",
            pair("a", peak=90, seconds=200),
        ),
        "pair bfloat16 1: peak of device memory": (
            "pair bfloat16 1",
            pair("a", peak=101, seconds=100),
        ),
    }
    for what, (name, wrong) in faults.items():
        assert failed(judge(good | {name: wrong}, tmp_path, on_gpu=True)) == [what]
    # On a CPU nothing is said of speed, memory or what differs from a CPU.
    slow = good | {name: wrong for name, wrong in faults.values() if name in ("speed", "facts")}
    verdicts = judge(slow, tmp_path, on_gpu=False)
    assert failed(verdicts) == []
    assert "not a GPU" in table("none", verdicts)


def test_several_gpus_are_used_together_and_then_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def quantize(folder: Path, name: str, environment: dict[str, str], **_: Any) -> Found:
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return {}

    monkeypatch.setattr("tests.cuda.pair.quantize", quantize)
    (tmp_path / "recipe.yaml").touch()
    for visible, expected in ((None, [None, "0"]), ("5,3", ["5,3", "5"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        check = Check(tmp_path, tiny=False, gpus=4)
        by_name = {step.name: step for step in check.steps}
        for name in ("pair bfloat16 1", "pair bfloat16 on one GPU"):
            by_name[name].run(1.0)
        assert seen[-2:] == expected
    assert "pair bfloat16 on one GPU" not in {x.name for x in Check(tmp_path, tiny=True).steps}


@pytest.mark.exhaustive
def test_codes_and_speed_are_measured(tmp_path: Path) -> None:
    told: list[Found] = []
    steps.codes(told.append, 128, str(tmp_path))
    assert told[-1]["output error, 4 bits"] < 0.7 * told[-1]["output error, 3 bits"]
    assert told[-1]["decoded otherwise"] == told[-1]["solved otherwise"] == []
    assert {file.stem for file in tmp_path.iterdir()} == {"gram", "pivots", "codes4", "codes3"}
    steps.speed(told.append, [[64, 128]])
    assert all(told[-1]["64 × 128"][name] > 0 for name in ("first", "then"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_pair_of_blocks_passes_the_command_and_a_single_process_alike(tmp_path: Path) -> None:
    check = Check(tmp_path, tiny=True)
    alone = Check(tmp_path, tiny=True, with_ray=False)

    def steps_of(one: Check, *names: str) -> list[Step]:
        return [step for step in one.steps if step.name in names]

    found = carry_out(steps_of(check, "model", "pair bfloat16 1"), 250, lambda found: None)
    one = found["pair bfloat16 1"]
    assert "failed" not in one, one
    assert set(one["files"]) == {f"model_{i:05d}.weights.h5" for i in range(3)}
    assert one["block_seconds"] > 0
    assert {"capture", "solve", "commit"} <= one["stage_seconds"].keys()
    assert [x.passed for x in check.verdicts(found)] == [None] * 4
    found = carry_out(steps_of(alone, "pair bfloat16 1"), 250, lambda found: None)
    assert found["pair bfloat16 1"].get("files") == one["files"]


@pytest.mark.slow
def test_the_whole_check_is_complete_on_a_cpu(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--tiny"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert not [name for name, one in report["steps"].items() if {"failed", "skipped"} & set(one)]
    same = [x["found"] for x in report["verdicts"] if x["what"].endswith("in two processes")]
    assert same == ["the same bytes"] * 2


def test_kernels_that_a_device_decodes_to_other_bits_are_named() -> None:
    [alike] = judge({"codes 1": {"decoded otherwise": []}}, Path(), on_gpu=True)
    [unlike] = judge({"codes 1": {"decoded otherwise": ["int8"]}}, Path(), on_gpu=True)
    assert (alike.found, alike.passed) == ("none", True)
    assert (unlike.found, unlike.passed) == ("int8", False)

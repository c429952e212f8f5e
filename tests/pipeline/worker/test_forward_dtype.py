"""A model in bfloat16 may be calibrated in bfloat16, as on GPUs; here on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pipeline.planning.make_plan
from pipeline.model.preset import read_preset
from pipeline.plan import InputGroup, Plan
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.captured_inputs import Captured
from pipeline.worker.statistics import finished, sum_inputs
from pipeline.worker.worker import Worker
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import CrashError, crash_at, lasting, recipe


def source(dtype: str) -> Path:
    return shared_preset("Llama3", num_blocks=2, dtype=dtype)


def plan_for(platform: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """A plan whose forward passes are those of a platform, to be carried out here."""
    chosen = pipeline.planning.make_plan._forward_dtype
    monkeypatch.setattr(
        pipeline.planning.make_plan,
        "_forward_dtype",
        lambda skeleton, _: chosen(skeleton, platform),
    )
    preset = read_preset(str(source(dtype)))
    return make_plan(preset, recipe("gptq", num_samples=20, sequence_length=128), threads=2)


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("gpu", "bfloat16", "bfloat16"),
        ("gpu", "float32", "float32"),
        ("cpu", "bfloat16", "float32"),
    ],
)
def test_only_gpus_run_a_model_in_its_own_bfloat16(
    platform: str, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(platform, dtype, monkeypatch).plan
    assert plan.forward_dtype == expected
    # It decides bytes; and plans of older versions, which knew only float32, stay what they were.
    assert plan.content().get("forward_dtype", "float32") == expected
    assert ("forward_dtype" in plan.content()) == (expected != "float32")
    assert Plan.from_json(plan.to_json()) == plan
    other = dataclasses.replace(
        plan, forward_dtype="float32" if expected == "bfloat16" else "bfloat16"
    )
    assert other.digest != plan.digest


def run(given: Planned, store: ObjectStore, **options: object) -> Manifest:
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    executor = LocalExecutor([Worker(given.plan, str(source("bfloat16")), store.root_url)])
    report = options.get("report", lambda step: None)
    return quantize(given.plan, store, executor, report, keep_every=1)  # type: ignore[arg-type]


def output_errors(store: ObjectStore) -> dict[str, float]:
    found = {}
    for key in store.list("records/"):
        for layer in json.loads(store.get(key))["content"]["layers"]:
            if layer["account"] is not None:
                found[layer["path"]] = layer["account"]["output_error"]
    return found


@pytest.mark.exhaustive
def test_a_run_in_bfloat16_is_as_good_and_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = plan_for("gpu", "bfloat16", monkeypatch)
    whole, cut, exact = (open_store(str(tmp_path / name)) for name in ("whole", "cut", "exact"))
    run(own, whole)
    with pytest.raises(CrashError):
        run(own, cut, report=crash_at(1))
    run(own, cut)
    assert lasting(cut) == lasting(whole)
    run(
        dataclasses.replace(own, plan=dataclasses.replace(own.plan, forward_dtype="float32")), exact
    )
    errors, others = output_errors(whole), output_errors(exact)
    assert errors.keys() == others.keys()
    assert len(errors) == 14
    assert errors != others
    ratios = [errors[path] / others[path] for path in errors]
    assert 0.95 < min(ratios) <= max(ratios) < 1.05


def test_a_gram_of_bfloat16_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    group = InputGroup(targets=("dense",), in_features=64, statistics="hessian")
    batches = [jnp.asarray(rng.standard_normal((2, 32, 64)), jnp.bfloat16) for _ in range(3)]
    all_rows = np.ones((2, 32), bool)
    masks = [all_rows, np.arange(32)[None] < np.array([[20], [32]]), all_rows]
    found = finished(sum_inputs(map(Captured, batches, masks), group, (-1,)))
    rows = [np.asarray(x, np.float64)[mask] for x, mask in zip(batches, masks, strict=True)]
    exact = sum(part.T @ part for part in rows)
    assert found.gram_CC.dtype == np.float32  # type: ignore[union-attr]
    np.testing.assert_allclose(found.gram_CC, exact, rtol=1e-5, atol=1e-4)  # type: ignore[union-attr]
    assert found.num_rows == 64 + 52 + 64

from __future__ import annotations

import dataclasses
import io
import json

from rich.console import Console

from jobs.summary import Summary, plan_table, summary_table
from pipeline.estimates import estimate
from pipeline.executor.protocol import Allocation
from pipeline.fidelity import Fidelity
from pipeline.recipe.recipe import Rule
from pipeline.run.records import PartRecord
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.tiny_runs import execute, planned


def finished(scheme: str) -> tuple[ObjectStore, Summary]:
    store = open_store(f"memory://test-summary/{scheme}")
    manifest, _ = execute(planned(scheme), store)
    plan = planned(scheme).plan
    summary = Summary.of(
        plan,
        store,
        manifest,
        estimate(plan, 1),
        {"solve": 2.0, "read": 1.0},
        wall_seconds=4.0,
        fidelity=Fidelity(
            num_windows=1,
            count=9,
            source_perplexity=10.0,
            result_perplexity=11.0,
            divergence=0.1,
            agreement=0.5,
        ),
    )
    return store, summary


def test_a_summary_adds_up_the_records() -> None:
    store, summary = finished("gptq")
    records = [PartRecord.from_json(store.get(key)) for key in store.list("records/")]
    assert summary.stored_bytes == sum(len(store.get(record.file)) for record in records)
    assert summary.loaded_bytes == sum(record.loaded_bytes for record in records)
    accounts = [layer.account for r in records for layer in r.layers if layer.account]
    [row] = summary.schemes
    assert row.layers == len(accounts) == 21
    ratios = [a["output_error"] / a["rtn_output_error"] for a in accounts]
    assert row.error_against_rtn == sum(ratios) / len(ratios)
    assert row.error_against_rtn < 1
    assert json.loads(json.dumps(summary.to_dict()))["schemes"][0]["scheme"] == "gptq/4/32"


def test_a_scheme_without_calibration_has_no_comparison() -> None:
    _, summary = finished("int8")
    [row] = summary.schemes
    assert row.error_against_rtn is None
    assert row.weight_error is not None
    assert (row.rounded, row.damped) == (0, 0)


def test_the_table_shows_sizes_quality_and_time() -> None:
    _, summary = finished("gptq")
    stream = io.StringIO()
    Console(file=stream, width=160).print(summary_table(summary))
    text = stream.getvalue()
    for part in ("10.000 → 11.000", "KL 0.1000", "50.0%", "4.0 in all", summary.manifest_sha256):
        assert part in text


def shown(scheme: str, architecture: str = "Llama3") -> str:
    stream = io.StringIO()
    plan = planned(scheme, architecture).plan
    table = plan_table(plan, estimate(plan, 2), Allocation(workers=2, threads=3))
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_a_plan_shows_layers_schemes_costs_and_workers() -> None:
    text = shown("gptq")
    for part in (
        planned("gptq").plan.digest[:12],
        "self_attention/query",
        "gptq/4/32",
        "20 windows of 128 tokens in 2 shards",
        "2 × 3 threads",
        "peak of a worker",
    ):
        assert part in text
    assert "calibration" not in shown("int8")


def test_every_reason_for_float_is_shown_once_with_a_layer() -> None:
    text = shown("gptq", "Bert")
    lines = [line for line in text.splitlines() if line.startswith("left in float: ")]
    assert len(lines) == len({line.split(": ", 2)[2] for line in lines}) >= 3


def test_a_rule_that_matches_no_layer_is_shown() -> None:
    plan = planned("gptq").plan
    rules = tuple(Rule(pattern=p, scheme=None) for p in ("querry", "self_attention/key"))
    other = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"rules": rules}))
    stream = io.StringIO()
    table = plan_table(other, estimate(other, 1), Allocation(workers=1, threads=1))
    Console(file=stream, width=200).print(table)
    lines = [line for line in stream.getvalue().splitlines() if "rule without a layer" in line]
    assert [line.split("'")[1] for line in lines] == ["querry"]

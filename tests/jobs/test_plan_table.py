import dataclasses
import io

from rich.console import Console

from jobs.plan_table import plan_table
from pipeline.estimates import estimate
from pipeline.executor.ray_cluster import Resources
from pipeline.recipe.recipe import Rule
from tests.pipeline.tiny_runs import planned


def shown(scheme: str, architecture: str = "Llama3") -> str:
    stream = io.StringIO()
    plan = planned(scheme, architecture).plan
    table = plan_table(plan, estimate(plan, 2), Resources(workers=2, threads=3))
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_a_plan_shows_layers_schemes_costs_and_place() -> None:
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


def test_a_rule_that_decides_no_layer_is_shown() -> None:
    plan = planned("gptq").plan
    rules = tuple(Rule(pattern=p, scheme=None) for p in ("querry", "self_attention/key"))
    other = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"rules": rules}))
    stream = io.StringIO()
    table = plan_table(other, estimate(other, 1), Resources(workers=1, threads=1))
    Console(file=stream, width=200).print(table)
    lines = [line for line in stream.getvalue().splitlines() if "rule without a layer" in line]
    assert [line.split("'")[1] for line in lines] == ["querry"]

"""What a dry run says of costs: for which machines, in which numbers, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.cli.main import main
from jobs.run_costs import (
    CatalogCost,
    PricedMachine,
    Workers,
    cost_json,
    cost_of,
    cost_table,
    costs_table,
)
from pipeline.executor.protocol import Allocation, ExecutorError
from pipeline.planning.estimates import estimate
from pipeline.planning.machines import RatesError, known_machines
from pipeline.planning.work import planned_on
from quantizer.schemes import Int8Scheme
from tests.pipeline.planning.small_plans import plan, slow_machine


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that is refused says; nothing is planned."""
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "nowhere", "--recipe", "int8", "--output", "out", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_machine_is_refused_with_the_known_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = complaint(capsys, "--dry-run", "--on", "8xT4")
    assert "no rates are known for a machine named 'T4'" in said
    for name in known_machines().by_name:
        assert name in said


@pytest.mark.parametrize("option", ["--on", "--rates"])
def test_costs_are_for_dry_runs(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "add --dry-run" in complaint(capsys, option, "8xH100")


def test_a_mistake_in_a_file_of_rates_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text("machines: {H100: {prize: 1}}")
    assert "unknown key prize" in complaint(capsys, "--dry-run", "--rates", str(path))


class Unused:
    """A process that nothing is asked of."""

    num_processes = 1

    def run(self, *_: Any) -> Any:
        raise AssertionError("nothing is to be measured")

    run_each = run


def test_gpus_at_hand_have_the_rates_of_their_kind() -> None:
    priced = PricedMachine.of(None, None)
    allocation = Allocation(workers=4, threads=8, gpus=1, accelerator="L4")
    found = priced.find(Unused(), allocation)
    assert found == Workers(number=4, machine=known_machines().named("L4"))


@pytest.mark.parametrize(
    ("given", "workers", "gpus"),
    [("8xH100", 1, 8), ("4xH100", 1, 4), ("16xH100", 2, 8), ("12xH100", 12, 1), ("8xL4", 8, 1)],
)
def test_named_gpus_are_those_of_whole_nodes(given: str, workers: int, gpus: int) -> None:
    named = PricedMachine.of(given, None).named
    assert named is not None
    assert (named.allocation.workers, named.allocation.gpus) == (workers, gpus)
    there = named.plan(plan())
    assert named.estimate(plan()) == estimate(there, workers, gpus)
    cost = cost_of(there, named, num_windows=0)
    assert (cost.workers, cost.to_dict()["gpus_per_worker"]) == (workers * gpus, gpus)


def test_without_calibration_each_named_gpu_has_a_worker() -> None:
    named = PricedMachine.of("8xH100", None).named
    assert named is not None
    rounded = plan(scheme=Int8Scheme())
    assert cost_of(named.plan(rounded), named, num_windows=0).together == 1
    assert named.estimate(rounded) == estimate(named.plan(rounded), 8)


def test_a_user_says_how_many_named_gpus_a_worker_has() -> None:
    named = PricedMachine.of("16xH100", None, 4).named
    assert named is not None
    assert (named.allocation.workers, named.allocation.gpus) == (4, 4)
    assert cost_of(named.plan(plan(scheme=Int8Scheme())), named, num_windows=0).together == 4
    for given, gpus, message in (
        ("8xH100", 9, "9 GPUs per worker, on 8 × H100: a node has 8"),
        ("8xH100", 3, "2 would be left over"),
        ("8xcpu16", 1, "that machine has no GPU"),
    ):
        with pytest.raises(RatesError, match=message):
            PricedMachine.of(given, None, gpus)


def test_gpus_of_one_worker_at_hand_count_each() -> None:
    allocation = Allocation(workers=2, threads=8, gpus=4, accelerator="H100")
    found = PricedMachine.of(None, None).find(Unused(), allocation)
    assert found == Workers(number=8, machine=known_machines().named("H100"), together=4)


def test_gpus_of_an_unknown_kind_have_no_cost_and_say_what_to_do() -> None:
    allocation = Allocation(workers=4, threads=8, gpus=1, accelerator="T4")
    found = PricedMachine.of(None, None).find(Unused(), allocation)
    assert isinstance(found, str)
    assert "GPUs T4; describe them in a file that you give as --rates" in found
    assert cost_json(found) == {"cost": None, "cost_unknown": found}


def test_cpus_at_hand_are_measured_and_priced_as_the_user_says(tmp_path: Path) -> None:
    class Measured(Unused):
        def run(self, *_: Any) -> Any:
            return slow_machine()

    path = tmp_path / "rates.yaml"
    path.write_text("machines: {here: {price_per_hour: 2}}")
    priced = PricedMachine.of(None, str(path))
    found = priced.find(Measured(), Allocation(workers=2, threads=1))
    assert found == Workers(number=2, machine=slow_machine(price_per_hour=2.0))
    on_gpus = priced.find(Unused(), Allocation(workers=1, threads=1, gpus=1, accelerator="L4"))
    assert isinstance(on_gpus, Workers)
    assert on_gpus.machine.price_per_hour == 2.0


def test_a_named_machine_without_room_is_refused() -> None:
    small = known_machines().named("L4").model_copy(update={"memory_bytes": 1e6})
    workers = Workers(number=2, machine=small)
    with pytest.raises(ExecutorError, match=r"on 2 × L4 it has .* of its L4"):
        workers.check_room(workers.estimate(plan()))
    roomy = Workers(number=2, machine=known_machines().named("L4"))
    roomy.check_room(roomy.estimate(plan()))
    host = Workers(number=1, machine=slow_machine(memory_bytes=1e6))
    with pytest.raises(ExecutorError, match="too little memory"):
        host.check_room(host.estimate(plan()))


def test_a_named_gpu_takes_micro_batches_that_fit_it() -> None:
    """As a plan that is made there does; it would be refused otherwise."""
    given = plan()
    assert given.tokens is not None
    # Two windows at once on a GPU, and 256 MiB of attention scores for each.
    tokens = dataclasses.replace(given.tokens, sequence_length=1 << 10)
    long = planned_on(dataclasses.replace(given, tokens=tokens), "gpu")
    assert long.tokens is not None
    assert long.tokens.micro_batch == 2
    scores = dataclasses.replace(long.tokens, largest_array_bytes=512 << 20)
    long = dataclasses.replace(long, tokens=scores)
    small = known_machines().named("L4").model_copy(update={"memory_bytes": 1.4e9})
    workers = Workers(number=1, machine=small)
    workers.check_room(workers.estimate(long))
    there = workers.plan(long).tokens
    assert there is not None
    assert (there.micro_batch, there.largest_array_bytes) == (1, 256 << 20)
    assert [b - a for a, b in there.shards] == [b - a for a, b in long.tokens.shards]


def shown(table: Any) -> str:
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_table_has_the_numbers_of_the_json() -> None:
    workers = Workers(number=3, machine=slow_machine(price_per_hour=36.0))
    cost = cost_of(plan(), workers, num_windows=2)
    values = cost_json(cost)["cost"]
    assert values["seconds"] == pytest.approx(sum(x["seconds"] for x in values["stages"]))
    assert values["price"] == pytest.approx(36 * values["worker_hours"])
    text = shown(cost_table(cost))
    assert f"{values['seconds']:.1f}" in text
    assert f"${values['price']:.2f}" in text
    assert "a model, not a measurement" in text
    for stage in values["stages"]:
        assert f"{stage['seconds']:.1f}" in text


def test_several_runs_are_summed() -> None:
    workers = Workers(number=1, machine=slow_machine(price_per_hour=3600.0))
    cost = cost_of(plan(), workers, num_windows=0)
    text = shown(
        costs_table(
            CatalogCost(name=name, cost=cost, read_bytes=3 << 20, stored_bytes=1 << 20)
            for name in ("one", "two")
        )
    )
    assert f"${2 * cost.seconds:.2f}" in text

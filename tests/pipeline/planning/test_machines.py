"""Machines by name, and what a user's file of rates changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.planning.machines import RatesError, known_machines, workers_on


def rates(folder: Path, text: str) -> str:
    path = folder / "rates.yaml"
    path.write_text(text)
    return str(path)


def test_every_machine_of_the_package_says_where_its_rates_and_price_come_from() -> None:
    for name, machine in known_machines().by_name.items():
        assert machine.name == name
        assert machine.source
        assert machine.price_per_hour is None or machine.price_source.startswith("example, ")


def test_peaks_are_those_of_the_data_sheets() -> None:
    found = known_machines().by_name
    peaks = {
        name: (m.float32_flops / 1e12, m.bfloat16_flops / 1e12, m.memory_bytes_per_second / 1e12)
        for name, m in found.items()
        if m.device == "gpu"
    }
    assert peaks == {
        "H100": (67, 989, 3.35),
        "H200": (67, 989, 4.8),
        "A100-80G": (19.5, 312, 2.039),
        "L4": (30.3, 121, 0.3),
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("8xH100", (8, "H100")), ("L4", (1, "L4")), ("2Xcpu16", (2, "cpu16")), ("x1", (1, "x1"))],
)
def test_workers_are_a_number_and_a_name(text: str, wanted: tuple[int, str]) -> None:
    assert workers_on(text) == wanted


@pytest.mark.parametrize("text", ["", "8x", "0xH100"])
def test_no_workers_or_no_machine_is_refused(text: str) -> None:
    with pytest.raises(RatesError, match="give a number of workers and a machine, such as 8xH100"):
        workers_on(text)


def test_a_machine_is_found_in_any_case_and_an_unknown_one_names_the_known() -> None:
    machines = known_machines()
    assert machines.named("h100") == machines.by_name["H100"]
    with pytest.raises(RatesError, match=r"'T4', but for H100, H200, A100-80G, L4, cpu16;"):
        machines.named("T4")


def test_a_file_changes_prices_adds_machines_and_describes_the_one_at_hand(tmp_path: Path) -> None:
    text = """
machines:
  H100: {price_per_hour: 2}
  ours: {like: L4, price_per_hour: 0.25, source: our own rack}
  here: {price_per_hour: 0.5}
"""
    found, before = known_machines(rates(tmp_path, text)), known_machines().by_name
    own_price = {"price_per_hour": 2.0, "price_source": ""}
    assert found.named("H100") == before["H100"].model_copy(update=own_price)
    assert found.named("ours").memory_bytes == before["L4"].memory_bytes
    assert found.named("ours").source == "our own rack"
    assert found.at_hand(before["cpu16"]).price_per_hour == 0.5
    assert "here" not in found.by_name


def test_a_price_of_ones_own_has_no_other_source(tmp_path: Path) -> None:
    text = "machines: {rack: {like: L4, price_per_hour: 0.3}, here: {price_per_hour: 1}}"
    found = known_machines(rates(tmp_path, text))
    assert found.named("rack").price_source == ""
    assert found.named("rack").source == known_machines().named("L4").source
    assert found.at_hand(found.named("L4")).price_source == ""


def test_rates_of_ones_own_are_not_taken_for_the_makers(tmp_path: Path) -> None:
    text = "machines: {rack: {like: L4, memory_bytes: 1}, here: {memory_bytes: 2}}"
    found, maker = known_machines(rates(tmp_path, text)), known_machines().named("L4")
    for machine in (found.named("rack"), found.at_hand(maker)):
        assert machine.source == f"{tmp_path / 'rates.yaml'}, and for the rest: {maker.source}"


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    """As 1e9, which has no dot."""
    text = "machines: {here: {storage_bytes_per_second: 1e9}, H100: {memory_bytes: 2e9}}"
    found = known_machines(rates(tmp_path, text))
    assert found.at_hand(found.named("L4")).storage_bytes_per_second == 1e9
    assert found.named("H100").memory_bytes == 2e9


@pytest.mark.parametrize("key", ["like", "name", "device"])
def test_what_the_machine_at_hand_is_cannot_be_said(key: str, tmp_path: Path) -> None:
    with pytest.raises(RatesError, match=f"rates.yaml:1: here: {key} is known of the machine"):
        known_machines(rates(tmp_path, f"machines: {{here: {{{key}: cpu}}}}"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("machines: {H100: {price: 1}}", "H100: unknown key price"),
        (
            "machines:\n  H100:\n    memory_bytes: 0",
            "rates.yaml:3: H100: memory_bytes must be greater than 0, got 0",
        ),
        ("machines: {mine: {device: gpu}}", "mine: float32_flops is missing; add it"),
        ("machines: {mine: {like: T4}}", "mine is to be like 'T4', which is not known"),
        ("machines: {here: {price_per_hour: cheap}}", "here: price_per_hour"),
        ("H100: {}", "unknown key H100; the keys here are machines"),
        ("a: [", "correct the YAML there"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RatesError) as refused:
        known_machines(rates(tmp_path, text))
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RatesError, match=r"gone\.yaml: No such file"):
        known_machines(str(tmp_path / "gone.yaml"))

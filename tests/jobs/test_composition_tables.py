"""What people see of a choice where there is no terminal: a line for each row, none of it long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.composition_tables import BlockRow, Outlook, Point, RunRow, blocks_of
from jobs.logging import print_table
from pipeline.composition.composed_plan import GivenLayers

NAMES = ("gptq-w2-g64", "gptq-w3-g64", "gptq-w4-g64")
BLOCKS = [f"llama_transformer_decoder_{number}" for number in range(30)]
UNITS = (
    ("_self_attention_layer/_query_dense", "_self_attention_layer/_key_dense"),
    ("_self_attention_layer/_output_dense",),
    ("_feedforward_intermediate_dense", "_feedforward_gate_dense"),
)


@pytest.mark.parametrize(
    ("picked", "expected"),
    [
        ([0, 1, 1, 0, 1], "a: 0, 3; b: 1–2, 4"),
        ([1], "b: 0"),
    ],
)
def test_blocks_are_named_in_ranges(picked: list[int], expected: str) -> None:
    assert blocks_of(picked, ["a", "b"]) == expected


def outlook() -> Outlook:
    """Every other block of another run, and in each block layers of two others."""
    picked = tuple(number % 2 for number in range(30))
    layers = tuple(
        GivenLayers(
            block=block,
            run=2 if unit else 1 - picked[block],
            layers=tuple(f"{name}/{layer}" for layer in layers),
        )
        for block, name in enumerate(BLOCKS)
        for unit, layers in enumerate(UNITS)
    )
    choice = Point(num_bytes=50_000_000, bits=3.5, expected=0.4, picked=picked)
    return Outlook(
        target="--target-bits 3.5",
        figure="divergence",
        num_windows=8,
        runs=tuple(
            RunRow(recipe=name, url="", num_bytes=1, bits=3.0, expected=0.5) for name in NAMES
        ),
        blocks=tuple(
            BlockRow(
                name=name,
                num_bytes=(1, 2, 3),
                costs=(0.1, 0.2, 0.3),
                standard_errors=(0.01, 0.01, 0.01),
                picked=picked[number],
            )
            for number, name in enumerate(BLOCKS)
        ),
        choice=choice,
        curve=(choice,),
        by_layers=Point(num_bytes=1, bits=3.4, expected=0.3, picked=picked, layers=layers),
    )


def test_rows_are_lines_and_no_line_is_long_in_a_pipe() -> None:
    stream = io.StringIO()
    print_table(Console(file=stream, width=80, color_system=None), outlook().tables())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 130
    even, odd = (", ".join(map(str, range(first, 30, 2))) for first in (0, 1))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    for expected in (
        ["_self_attention_layer: _query_dense, _key_dense", NAMES[1], even],
        ["_self_attention_layer: _query_dense, _key_dense", NAMES[0], odd],
        ["_self_attention_layer: _output_dense", NAMES[2], "0–29"],
        ["_feedforward_intermediate_dense, _feedforward_gate_dense", NAMES[2], "0–29"],
    ):
        assert rows.count(expected) == 1
    [chosen] = [row for row in rows if row[:1] == ["chosen"]]
    assert chosen[-1] == f"{NAMES[0]}: 15 blocks; {NAMES[1]}: 15 blocks"

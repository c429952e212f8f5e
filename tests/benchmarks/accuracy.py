"""How much output error quantization costs on a real encoder, beside Keras' own GPTQ.

python -m tests.benchmarks.accuracy            every layer of all blocks, 2, 3, 4 and 8 bits
python -m tests.benchmarks.accuracy --blocks 1 the layers of the first block
python -m tests.benchmarks.accuracy --demo     one block, 4 and 3 bits, and the other schemes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quantizer import AWQScheme, Int4Scheme, Int8Scheme
from tests.benchmarks.comparison import Comparison, compare, output_energy, scheme_error
from tests.benchmarks.keras_gptq import KerasGPTQ
from tests.benchmarks.minilm import RealLayer, record_layers

DEMO_BITS = (4, 3)
ALL_BITS = (8, 4, 3, 2)


def compare_all(
    layers: Sequence[RealLayer], widths: Sequence[int], group_size: int, progress: Progress
) -> list[Comparison]:
    """Every layer at every width, in a table's order."""
    task = progress.add_task("quantizing", total=len(layers) * len(widths))
    comparisons = []
    with KerasGPTQ("numpy") as keras_gptq:
        for bits in widths:
            for layer in layers:
                progress.update(task, description=f"{bits} bits, layer {layer.name}")
                comparisons.append(compare(layer, keras_gptq, bits=bits, group_size=group_size))
                progress.advance(task)
    progress.update(task, description="done")
    return comparisons


def other_schemes(layers: Sequence[RealLayer], group_size: int) -> dict[str, float]:
    """The error of our other schemes over all the layers' outputs together."""
    schemes = {
        "awq, 4 bits": AWQScheme(group_size=group_size),
        "int4": Int4Scheme(block_size=group_size),
        "int8": Int8Scheme(),
    }
    energies = [output_energy(layer) for layer in layers]

    def together(errors: Iterator[float]) -> float:
        losses = (error * energy for error, energy in zip(errors, energies, strict=True))
        return sum(losses) / sum(energies)

    return {
        name: together(scheme_error(layer, scheme) for layer in layers)
        for name, scheme in schemes.items()
    }


def error_table(comparisons: Sequence[Comparison], others: dict[str, float]) -> Table:
    """One row per layer and width, the other schemes below."""
    table = Table(title="output error of all-MiniLM-L6-v2's layers, % of the output's energy")
    table.add_column("bits", justify="right")
    table.add_column("layer")
    table.add_column("in → out", justify="right")
    for name in ("rounding", "Keras GPTQ", "ours", "Keras ÷ ours"):
        table.add_column(name, justify="right")
    for before, each in zip([None, *comparisons], comparisons, strict=False):
        if before is not None and before.bits != each.bits:
            table.add_section()
        table.add_row(
            str(each.bits),
            each.layer.removesuffix("_dense").replace("_", " "),
            f"{each.in_features} → {each.out_features}",
            _percent(each.rtn),
            _percent(each.keras),
            _percent(each.ours),
            f"[{'green' if each.gain > 1 else 'red'}]{each.gain:.1f}[/]",
        )
    table.add_section()
    for name, error in others.items():
        table.add_row("", f"{name}: all layers", "", "", "", _percent(error), "")
    return table


def conclusion(comparisons: Sequence[Comparison]) -> str:
    """What the table says, in one sentence."""
    widths = dict.fromkeys(each.bits for each in comparisons)
    told = []
    for bits in widths:
        of_width = [each for each in comparisons if each.bits == bits]
        gain = statistics.median(each.gain for each in of_width)
        default = statistics.median(each.keras_default / each.ours for each in of_width)
        told.append(f"{gain:.1f}× at {bits} bits ({default:.1f}× below its default order)")
    lower = sum(each.gain > 1 for each in comparisons)
    sound = sum(each.ours <= each.rtn for each in comparisons)
    return (
        f"Our GPTQ's output error is below Keras' by a median {', '.join(told)}; below Keras' in "
        f"{lower} and no higher than rounding in {sound} of {len(comparisons)} cases."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--demo", action="store_true", help="one block, 4 and 3 bits")
    parser.add_argument("--blocks", type=int, help="only the first BLOCKS of 6")
    parser.add_argument("--bits", type=int, nargs="+", choices=ALL_BITS)
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    widths = arguments.bits or (DEMO_BITS if arguments.demo else ALL_BITS)
    blocks = arguments.blocks or (1 if arguments.demo else None)
    console = Console()
    with console.status("running all-MiniLM-L6-v2 on Python's manual"):
        layers = record_layers(blocks=blocks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        comparisons = compare_all(layers, widths, arguments.group_size, progress)
    others = other_schemes(layers, arguments.group_size)
    console.print(error_table(comparisons, others))
    console.print(
        "rounding: to nearest on the min-max grid. Keras GPTQ: Keras' own, in the better of its "
        "two activation\norders. ours: activation order, scale search and refinement. All with "
        f"groups of {arguments.group_size} and the same calibration data."
    )
    console.print(f"[bold]{conclusion(comparisons)}[/bold]")
    if arguments.json:
        found = [dataclasses.asdict(each) for each in comparisons]
        arguments.json.write_text(json.dumps({"gptq": found, "others": others}, indent=2))


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


if __name__ == "__main__":
    main()

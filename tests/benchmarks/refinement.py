"""What sweeps, and scales refitted before each of them, do to the output error of a real encoder.

python -m tests.benchmarks.refinement             all-MiniLM-L6-v2's second block, 4, 3 and 2 bits
python -m tests.benchmarks.refinement --blocks 6  all of its blocks
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from quantizer import GPTQScheme, solve
from tests.benchmarks.minilm import RealLayer, record_layers

SWEEPS = (0, 1, 2, 3)


def compare(layers: Sequence[RealLayer], bits: int, group_size: int) -> list[tuple[str, ...]]:
    """Rows of a table: sweeps, refit, mean error (geometric) and time against two plain sweeps."""
    plain = GPTQScheme(
        weight_bits=bits, group_size=group_size, activation_order=True, refinement_sweeps=2
    )
    schemes = [
        dataclasses.replace(plain, refinement_sweeps=sweeps, scale_refit=refit)
        for sweeps in SWEEPS
        for refit in (False, True)
        if sweeps or not refit
    ]
    found = {scheme: _of_all(layers, scheme) for scheme in schemes}
    errors, seconds = found[plain]
    return [
        (
            str(bits),
            str(scheme.refinement_sweeps),
            "yes" if scheme.scale_refit else "no",
            f"{np.exp(np.mean(np.log(found[scheme][0] / errors))):.3f}",
            f"{found[scheme][1] / seconds:.2f}",
        )
        for scheme in schemes
    ]


def _of_all(layers: Sequence[RealLayer], scheme: GPTQScheme) -> tuple[np.ndarray, float]:
    """Output error of each layer, and the processor's seconds for all, compiled before."""
    errors, seconds = [], 0.0
    for layer in layers:
        solve(layer.weight_RC, layer.hessian, scheme)
        start = time.process_time()
        result = solve(layer.weight_RC, layer.hessian, scheme)
        seconds += time.process_time() - start
        errors.append(result.report.output_error)
    return np.array(errors), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.refinement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blocks", type=int, help="all of the first BLOCKS, not the second alone")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2), choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    layers = record_layers(blocks=arguments.blocks or 2)
    if arguments.blocks is None:
        layers = [layer for layer in layers if layer.name.startswith("1 ")]
    table = Table(title="all-MiniLM-L6-v2: output error and time, as multiples of two sweeps'")
    for name in ("bits", "sweeps", "refit", "error", "time"):
        table.add_column(name, justify="right")
    for bits in arguments.bits:
        for row in compare(layers, bits, arguments.group_size):
            table.add_row(*row)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()

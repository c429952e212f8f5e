"""Time the GPTQ solver beside the machine's limit, Keras' own GPTQ and a NumPy column loop.

The limit is the flops that no GPTQ of this form can avoid, R·C² + ⅔·C³ (C inputs, R outputs),
at the rate of a large float32 matrix product measured in the same rounds. Everything takes turns,
round by round, so that a busy machine slows all of it alike; medians are shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console

from quantizer import GPTQScheme, HessianSum, solve
from tests.benchmarks.column_loop import quantize_columns
from tests.benchmarks.keras_gptq import KerasGPTQ
from tests.benchmarks.solver_phases import phase_seconds
from tests.benchmarks.solver_report import print_report

SIZES = ("512x512", "576x576", "1536x576", "2048x2048", "4096x4096", "4096x11008")
_BITS = 4
_PRODUCT_SIZE = 4096
_PRODUCT_FLOPS = 2.0 * _PRODUCT_SIZE**3
_KERAS_LARGEST = 600 * 600  # above it, Keras needs minutes to compile on JAX
_KERAS_PATIENCE = 60.0
_KERAS_WARM_UP = 300.0
_SLOW = 5.0  # seconds after which one measurement is enough
_BURST = 0.2  # seconds to spend on a short call in each round
_MOST_CALLS = 10
_REST = 0.05  # lets the threads of NumPy's BLAS stop spinning before the next call


@dataclass
class Timing:
    """One size's measurements, in seconds.

    Attributes:
        num_inputs, num_outputs, group_size: the layer.
        product: the large matrix product.
        runs: what was timed, by name; short calls several times a round.
        first: the first call of each of ours, compilation included.
        phases: median seconds of the parts of our best variant.
        skipped: why something has no runs.
    """

    num_inputs: int
    num_outputs: int
    group_size: int
    product: list[float] = field(default_factory=list)
    runs: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Flops per second of the large matrix product, round by round."""
        return [_PRODUCT_FLOPS / seconds for seconds in self.product]

    @property
    def limit(self) -> float:
        """Seconds of R·C² + ⅔·C³ flops at that rate."""
        inputs, outputs = self.num_inputs, self.num_outputs
        return (outputs * inputs**2 + 2 / 3 * inputs**3) / statistics.median(self.rates)

    def median(self, name: str) -> float | None:
        """Median seconds of one contender; None when it did not run."""
        return statistics.median(self.runs[name]) if self.runs.get(name) else None


def seconds_of(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def correlated_layer(num_inputs: int, num_outputs: int) -> tuple[np.ndarray, HessianSum]:
    """A random weight, and a Hessian of inputs that are correlated as activations are."""
    rng = np.random.default_rng(num_inputs + num_outputs)
    weight_RC = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
    mixing_KC = rng.standard_normal((num_inputs // 4, num_inputs), dtype=np.float32)
    rows = 2 * num_inputs
    inputs = rng.standard_normal((rows, num_inputs), dtype=np.float32)
    shared = rng.standard_normal((rows, num_inputs // 4), dtype=np.float32)
    return weight_RC, HessianSum.of(inputs + shared @ mixing_KC / np.sqrt(num_inputs // 4))


def large_product() -> Callable[[], Array]:
    """A compiled float32 matrix product that saturates the device."""
    operand = jnp.ones((_PRODUCT_SIZE, _PRODUCT_SIZE))
    product = jax.jit(partial(jnp.matmul, precision=lax.Precision.HIGHEST))
    product(operand, operand).block_until_ready()
    return lambda: product(operand, operand).block_until_ready()


def measure(num_inputs: int, num_outputs: int, repeats: int, product: Callable) -> Timing:
    """Time one size, everything in turn."""
    timing = Timing(num_inputs, num_outputs, 128 if num_inputs % 128 == 0 else 64)
    weight_RC, hessian = correlated_layer(num_inputs, num_outputs)
    hessian_CC = hessian.gram_CC * np.float32(2 / hessian.num_rows)
    options = {"weight_bits": _BITS, "group_size": timing.group_size}
    schemes = {
        "plain": GPTQScheme(**options, scale_search=False, activation_order=False),
        "best": GPTQScheme(**options, scale_search=True, activation_order=True),
    }
    contenders: dict[str, Callable[[], float]] = {}
    for name, scheme in schemes.items():
        call = partial(solve, weight_RC, hessian, scheme)
        timing.first[name] = seconds_of(call)
        contenders[name] = partial(seconds_of, call)
    numpy_loop = partial(
        quantize_columns,
        weight_RC,
        hessian_CC,
        bits=_BITS,
        group_size=timing.group_size,
        damping=0.01,
    )
    contenders["NumPy loop"] = partial(seconds_of, numpy_loop)

    with ExitStack() as processes:
        for backend in ("jax", "numpy"):
            name = f"Keras ({backend})"
            if num_inputs * num_outputs > _KERAS_LARGEST:
                timing.skipped[name] = "not run"
                continue
            keras_gptq = processes.enter_context(KerasGPTQ(backend))
            run = partial(
                keras_gptq.solve, weight_RC, hessian_CC, bits=_BITS, group_size=timing.group_size
            )
            try:
                timing.first[name] = run(timeout=_KERAS_WARM_UP)[1]
            except TimeoutError:
                timing.skipped[name] = f"> {_KERAS_WARM_UP:g} s to warm up"
                continue
            contenders[name] = lambda run=run: run(timeout=_KERAS_PATIENCE)[1]
        for _ in range(repeats):
            timing.product.append(seconds_of(product))
            for name, contender in contenders.items():
                runs = timing.runs.setdefault(name, [])
                if name in timing.skipped or (runs and name not in schemes and runs[0] > _SLOW):
                    continue
                time.sleep(_REST)
                try:
                    runs.append(contender())
                    more = int(min(_BURST / runs[-1], _MOST_CALLS))
                    runs += [contender() for _ in range(more)]
                except TimeoutError:
                    timing.skipped[name] = f"> {_KERAS_PATIENCE:g} s"
    timing.phases = phase_seconds(weight_RC, hessian, schemes["best"], repeats)
    return timing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.solver", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="INxOUT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    console = Console()
    product = large_product()
    timings = []
    for size in arguments.sizes:
        num_inputs, num_outputs = (int(each) for each in size.replace("×", "x").split("x"))
        with console.status(f"timing {num_inputs}×{num_outputs}"):
            timings.append(measure(num_inputs, num_outputs, arguments.repeats, product))
    print_report(console, timings)
    if arguments.json:
        device = jax.devices()[0].device_kind
        found = [dataclasses.asdict(each) | {"limit": each.limit} for each in timings]
        arguments.json.write_text(json.dumps({"device": device, "sizes": found}, indent=2))


if __name__ == "__main__":
    main()

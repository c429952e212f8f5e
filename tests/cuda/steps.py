"""What `make check-gpu` computes in processes of their own: one step each.

    python -m tests.cuda.steps NAME ARGUMENTS RESULT

ARGUMENTS are JSON. The result is written whenever there is more of it, so that a process that is
stopped still tells something.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

import quantizer
from pipeline.machine import check_device, machine
from pipeline.plan import InputGroup
from pipeline.worker.captured_inputs import Captured
from pipeline.worker.statistics import finished, sum_inputs
from quantizer.gptq.solve import share_input
from quantizer.keras_format.kernel_layout import dense_layout
from quantizer.keras_format.variables import decode_kernel, decode_on_device
from tests.stored_variables import random_variables

Tell: TypeAlias = Callable[[dict[str, Any]], None]

_SPEED_ROWS = 4096
_MEMORY = ("peak_bytes_in_use", "bytes_limit")


def facts(tell: Tell) -> None:
    """What a plan would name."""
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    tell(
        {
            "platform": device.platform,
            "machine": machine(os.cpu_count() or 1),
            "memory": {name: statistics[name] for name in _MEMORY if name in statistics},
        }
    )


def codes(tell: Tell, size: int, folder: str) -> None:
    """Gram, factor and codes of one weight, for comparison between devices and processes."""
    weight_RC, inputs_NC = _data(size, size, 4 * size)
    hessian = _hessian(inputs_NC)
    # In their own order: two inputs that are almost equally active may change places.
    pivot_C = share_input(hessian, quantizer.GPTQScheme(weight_bits=4)).energy_C
    found: dict[str, Any] = {"gram": _digest(hessian.gram_CC), "pivots": _digest(pivot_C)}
    np.save(f"{folder}/gram.npy", np.asarray(hessian.gram_CC))
    np.save(f"{folder}/pivots.npy", np.asarray(pivot_C))
    for bits in (4, 3):
        solved = quantizer.solve(weight_RC, hessian, _scheme(bits))
        weight = solved.weight
        found |= {
            f"codes, {bits} bits": _digest(weight.codes_RC, weight.scale_RG),
            f"output error, {bits} bits": _output_error(weight_RC, weight.dequantize(), inputs_NC),
        }
        np.save(f"{folder}/codes{bits}.npy", weight.codes_RC)
        tell(found)
    found["decoded otherwise"] = _decoded_otherwise(size)
    tell(found)
    tell(found | {"solved otherwise": _solved_otherwise(weight_RC, hessian)})


def _solved_otherwise(weight_RC: NDArray[np.float32], hessian: Any) -> list[str]:
    """The rows that get other bits alone, or after others, than as part of a whole weight.

    Which rows are solved together depends on how many workers there are.
    """
    scheme, half = _scheme(4), len(weight_RC) // 2
    whole = quantizer.solve(weight_RC, hessian, scheme).weight
    upper, lower = weight_RC[:half], weight_RC[half:]
    [after, before] = quantizer.solve_stack([upper, lower][::-1], hessian, scheme)
    solved = {
        "upper half alone": (slice(half), quantizer.solve(upper, hessian, scheme)),
        "lower half alone": (slice(half, None), quantizer.solve(lower, hessian, scheme)),
        "upper half last": (slice(half), before),
        "lower half first": (slice(half, None), after),
    }
    return [
        name
        for name, (rows, one) in solved.items()
        if (one.weight.codes_RC != whole.codes_RC[rows]).any()
        or (one.weight.scale_RG != whole.scale_RG[rows]).any()
    ]


def _decoded_otherwise(size: int) -> list[str]:
    """The schemes whose kernels the device decodes to other bits than NumPy."""
    layout, rng = dense_layout((size, size)), np.random.default_rng(0)
    other = []
    for scheme in (quantizer.GPTQScheme(), quantizer.AWQScheme(), quantizer.Int8Scheme()):
        variables = random_variables(layout, scheme, rng)
        expected = decode_kernel(variables, layout, scheme)
        found = decode_on_device(variables, layout, scheme, "float32")
        if np.asarray(found).tobytes() != expected.tobytes():
            other.append(scheme.policy)
    return other


def speed(tell: Tell, shapes: list[list[int]]) -> None:
    """Seconds to solve weights of these shapes, the first time and then."""
    found: dict[str, Any] = {}
    for out_features, in_features in shapes:
        weight_RC, inputs_NC = _data(out_features, in_features, _SPEED_ROWS)
        hessian = _hessian(inputs_NC)
        first, *then = (_seconds(weight_RC, hessian) for _ in range(3))
        statistics = jax.devices()[0].memory_stats() or {}
        found[f"{out_features} × {in_features}"] = {
            "first": first,
            "then": min(then),
            **{name: statistics[name] for name in _MEMORY if name in statistics},
        }
        tell(found)


def _seconds(weight_RC: NDArray[np.float32], hessian: Any) -> float:
    start = time.perf_counter()
    quantizer.solve(weight_RC, hessian, _scheme(4))
    return time.perf_counter() - start


def _scheme(bits: int) -> quantizer.GPTQScheme:
    return quantizer.GPTQScheme(
        weight_bits=bits, activation_order=True, scale_search=True, refinement_sweeps=2
    )


def _data(
    out_features: int, in_features: int, num_rows: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A weight, and inputs that are correlated and of unlike sizes, as real ones."""
    rng = np.random.default_rng(0)
    inputs_NC = rng.standard_normal((num_rows, in_features), np.float32)
    inputs_NC *= np.arange(1, in_features + 1, dtype=np.float32) ** -0.25
    inputs_NC[:, 1:] += 0.5 * inputs_NC[:, :-1]
    weight_RC = rng.standard_normal((out_features, in_features), np.float32)
    return weight_RC / np.float32(in_features**0.5), inputs_NC


def _hessian(inputs_NC: NDArray[np.float32]) -> Any:
    """As a worker sums it."""
    size = inputs_NC.shape[1]
    group = InputGroup(targets=("weight",), in_features=size, statistics="hessian")
    step = min(2048, len(inputs_NC))
    parts = np.array_split(inputs_NC, -(-len(inputs_NC) // step))
    rows = (
        Captured(jax.numpy.asarray(part[None]), np.ones((1, len(part)), bool)) for part in parts
    )
    return finished(sum_inputs(rows, group, (-1,)))


def _output_error(weight_RC: Any, restored_RC: Any, inputs_NC: Any) -> float:
    """‖x(W − Ŵ)ᵀ‖ / ‖xWᵀ‖, by NumPy, whatever computed the codes."""
    lost_NR = inputs_NC @ (weight_RC - restored_RC).T
    return float(np.linalg.norm(lost_NR) / np.linalg.norm(inputs_NC @ weight_RC.T))


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


STEPS: dict[str, Callable[..., None]] = {"facts": facts, "codes": codes, "speed": speed}


def main() -> None:
    name, arguments, result = sys.argv[1:]

    def tell(found: dict[str, Any]) -> None:
        whole = Path(f"{result}.new")
        whole.write_text(json.dumps(found))
        whole.replace(result)

    check_device()
    STEPS[name](tell, *json.loads(arguments))


if __name__ == "__main__":
    main()

"""Keras' own GPTQ, as released, in a process of its own.

Keras fixes its backend on import. Ours runs on JAX; Keras' GPTQ there compiles one program per
column (half a minute before the first 512×512 layer is done). On Keras' NumPy backend the same
released code starts at once. The codes of the two backends drift apart where float32 rounding
tips a weight to the next code; their output errors agree within a percent.

The process reads one request per line on stdin and answers on stdout; arrays lie in a folder.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Backend = Literal["numpy", "jax"]


class KerasGPTQ:
    """Keras' `GPTQ.quantize_and_correct_layer` on one backend; a context manager."""

    def __init__(self, backend: Backend) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="keras-gptq-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.keras_gptq", self._folder.name],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> KerasGPTQ:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def solve(
        self,
        weight_RC: Float32,
        hessian_CC: Float32,
        *,
        bits: int,
        group_size: int,
        activation_order: bool = False,
        symmetric: bool = False,
        hessian_damping: float = 0.01,
        timeout: float = 600,
    ) -> tuple[Float32, float]:
        """The dequantized weights and the seconds of `quantize_and_correct_layer` alone.

        Args:
            weight_RC: [out_features, in_features].
            hessian_CC: 2·xᵀx / rows, undamped, as Keras accumulates it.
            timeout: seconds to wait for the answer.

        Raises:
            TimeoutError: no answer in time; the process is then of no further use.
        """
        folder = Path(self._folder.name)
        np.save(folder / "weight.npy", weight_RC)
        np.save(folder / "hessian.npy", hessian_CC)
        config = {
            "weight_bits": bits,
            "group_size": group_size,
            "activation_order": activation_order,
            "symmetric": symmetric,
            "hessian_damping": hessian_damping,
        }
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(config) + "\n")
        requests.flush()
        if not select.select([answers], [], [], timeout)[0]:
            raise TimeoutError(f"Keras' GPTQ took more than {timeout:g} s")
        answer = answers.readline()
        if not answer:
            raise RuntimeError("Keras' GPTQ failed; its traceback is on stderr")
        return np.load(folder / "restored.npy"), json.loads(answer)["seconds"]


def _solve_layer(
    weight_RC: Float32, hessian_CC: Float32, config: dict[str, Any]
) -> tuple[Float32, float]:
    """Quantize a Dense layer with Keras; return the dequantized weights and the seconds."""
    # On import Keras reads KERAS_BACKEND, which only the child process has set.
    import keras
    from keras.src.quantizers.gptq import GPTQ
    from keras.src.quantizers.gptq_config import GPTQConfig

    num_outputs, num_inputs = weight_RC.shape
    layer = keras.layers.Dense(num_outputs, use_bias=False)
    layer.build((None, num_inputs))
    layer.kernel.assign(weight_RC.T)
    scheme = GPTQConfig(dataset=None, tokenizer=None, **config)
    layer.quantize("gptq", config=scheme)
    solver = GPTQ(layer, scheme)
    solver.hessian = keras.ops.convert_to_tensor(hessian_CC)

    start = time.perf_counter()
    solver.quantize_and_correct_layer()
    stored = [layer.quantized_kernel, layer.kernel_scale, layer.kernel_zero, layer.g_idx]
    codes, scale_RG, zero_RG, group_C = (np.asarray(each.value) for each in stored)
    seconds = time.perf_counter() - start

    if scheme.weight_bits == 4:
        unpacked = keras.quantizers.unpack_int4(codes, num_outputs, axis=0, dtype="uint8")
        codes = keras.ops.convert_to_numpy(unpacked)
    group_C = group_C.astype(np.int32)
    # float32 first: codes and zero points are unsigned.
    codes_RC, zero_RC = codes.astype(np.float32), zero_RG.astype(np.float32)[:, group_C]
    return (codes_RC - zero_RC) * scale_RG[:, group_C], seconds


def main(folder: Path) -> None:
    """Answer requests until stdin closes."""
    for request in sys.stdin:
        weight_RC, hessian_CC = np.load(folder / "weight.npy"), np.load(folder / "hessian.npy")
        restored_RC, seconds = _solve_layer(weight_RC, hessian_CC, json.loads(request))
        np.save(folder / "restored.npy", restored_RC)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

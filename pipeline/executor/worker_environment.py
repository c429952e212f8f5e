"""The environment that every process that computes starts with: what decides types and rounding.

JAX and XLA read it when they are imported, so that it has to be there before.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.executor.protocol import Allocation, ExecutorError
from pipeline.storage.backend import PATIENCE_VARIABLE

GPU_MEMORY_VARIABLE = "QUANTFLEET_GPU_MEMORY"
"""Environment variable: the share of its GPU's memory that a worker reserves when it starts; 0 for
none, where memory is taken as it is needed."""
GPU_MEMORY_SHARE = 0.9
"""A worker has its GPU for itself, and blocks of many sizes would leave gaps in memory that is
taken piece by piece. The rest is for CUDA, its libraries and their programs."""

GPU_FLAGS = {
    # No atomic sums, whose order differs from run to run.
    "--xla_gpu_deterministic_ops": "true",
    # Every process would otherwise time kernels and choose among them for itself: these two have
    # products done by cuBLAS, with the algorithm that its heuristics name first.
    "--xla_gpu_enable_triton_gemm": "false",
    "--xla_gpu_autotune_level": "0",
}
"""XLA's flags without which two processes on the same kind of GPU may round differently."""

_JAX_DEFAULTS = {
    "JAX_ENABLE_X64": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "default",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_DISABLE_JIT": "0",
    "JAX_DEBUG_NANS": "0",
    "JAX_DEBUG_INFS": "0",
    "JAX_TRANSFER_GUARD": "allow",
}
"""JAX's settings that decide types and rounding, or what it refuses, as if nobody had set any."""


def worker_environment(allocation: Allocation) -> dict[str, str]:
    """Environment variables of every process that computes; no secrets among them.

    Raises:
        ExecutorError: a variable of the user's contradicts what GPUs need, or is out of range.
    """
    # In the home directory: programs from where others may write are not to be trusted.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "quantfleet" / "xla"
    environment = {
        # Without it Keras takes TensorFlow.
        "KERAS_BACKEND": "jax",
        # Keras reads its dtype and epsilon from a file there, by default in the home directory.
        "KERAS_HOME": str(home / "quantfleet" / "keras"),
        "KERAS_NNX_ENABLED": "false",
        **_JAX_DEFAULTS,
        # May change how products are rounded: the same for all workers, and named in the plan.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        # The size of XLA's thread pool, on which the rounding of its products depends.
        "NPROC": str(allocation.threads),
        "OMP_NUM_THREADS": str(allocation.threads),
        "OPENBLAS_NUM_THREADS": str(allocation.threads),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # glibc would keep what each thread has freed apart from the others.
        "MALLOC_ARENA_MAX": "1",
        # Large pages where the kernel has them: a worker touches gigabytes anew, and on a virtual
        # machine a page fault is slow. Of two settings the last counts: the user's.
        "GLIBC_TUNABLES": ":".join(
            filter(None, ("glibc.malloc.hugetlb=1", os.environ.get("GLIBC_TUNABLES")))
        ),
    }
    environment |= _gpu_environment() if allocation.gpus else {"JAX_PLATFORMS": "cpu"}
    if PATIENCE_VARIABLE in os.environ:
        environment[PATIENCE_VARIABLE] = os.environ[PATIENCE_VARIABLE]
    return environment


def _gpu_environment() -> dict[str, str]:
    share = _gpu_memory_share()
    return {
        # And nothing else: where CUDA does not start, JAX would compute on the CPU.
        "JAX_PLATFORMS": "cuda",
        "XLA_FLAGS": with_gpu_flags(os.environ.get("XLA_FLAGS", "")),
        # Host threads are no part of a GPU's plan. What BLAS still sums here is small.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "default",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if share else "false",
        # JAX refuses to start where both are set, be it by a node's own environment.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "",
        "XLA_CLIENT_MEM_FRACTION": f"{share or GPU_MEMORY_SHARE:g}",
    }


def _gpu_memory_share() -> float:
    given = os.environ.get(GPU_MEMORY_VARIABLE, str(GPU_MEMORY_SHARE))
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ExecutorError(f"{GPU_MEMORY_VARIABLE} must be a number from 0 to 1, not {given!r}")
    return share


def with_gpu_flags(given: str) -> str:
    """The user's XLA_FLAGS, and after them those of `GPU_FLAGS` that they lack.

    Raises:
        ExecutorError: a flag contradicts them, or XLA_FLAGS names a file of flags.
    """
    flags = given.split()
    if flags and not flags[0].startswith("--"):
        raise ExecutorError(
            f"XLA_FLAGS names a file, {flags[0]}, and a plan must name what decides rounding; "
            "write its flags into the variable itself"
        )
    missing = dict(GPU_FLAGS)
    for flag in flags:
        name, _, value = flag.partition("=")
        if name not in GPU_FLAGS:
            continue
        if _meaning(value) != _meaning(GPU_FLAGS[name]):
            raise ExecutorError(
                f"XLA_FLAGS: {flag} lets two processes on one kind of GPU round differently, where "
                f"a run's bytes must be the same; take it out, or set {name}={GPU_FLAGS[name]}"
            )
        missing.pop(name, None)
    return " ".join([*flags, *(f"{name}={value}" for name, value in missing.items())])


def _meaning(value: str) -> str:
    """A flag's value in one spelling; a flag without any is switched on."""
    return {"": "true", "1": "true", "false": "0"}.get(value.lower(), value.lower())

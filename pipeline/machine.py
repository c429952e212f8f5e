"""What decides how results are rounded: the machine, and the versions of packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from pipeline.executor.protocol import ExecutorError

# Packages that compute the result; other versions may round differently.
_PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")

# JAX's plugins for CUDA, by the distribution that each comes with, in the order in which JAX
# itself prefers them.
_CUDA_PLUGINS = {
    "jax-cuda13-plugin": "jax_plugins.xla_cuda13",
    "jax-cuda12-plugin": "jax_plugins.xla_cuda12",
}
_DRIVER = Path("/proc/driver/nvidia/version")
_TF32 = "NVIDIA_TF32_OVERRIDE"
"""Environment variable of NVIDIA's libraries: 0 keeps TF32 out of all products."""


def machine(threads: int) -> dict[str, str]:
    """The kind of machine that this process runs on; other kinds may round differently.

    With the environment's XLA_FLAGS, of which some decide rounding, where there are any. On a CPU
    with the threads of its products; on a GPU, whose products the host's threads have no part in,
    with the versions of what computes them.
    """
    backend = jax.default_backend()
    found = {"platform": backend, "device": str(jax.devices()[0].device_kind)}
    if backend == "cpu":
        found["threads"] = str(threads)
    else:
        found |= cuda_versions(_cuda_plugin())
    if flags := os.environ.get("XLA_FLAGS", "").split():
        found["XLA_FLAGS"] = " ".join(flags)
    return found


def check_machine(planned: Mapping[str, str]) -> None:
    """Check that this process runs on what a run was planned for, and so rounds alike.

    Threads aside: each process is started with those of the plan.

    Raises:
        ExecutorError: it runs on something else; the message names this node and what differs.
    """
    expected = {name: value for name, value in planned.items() if name != "threads"}
    found = {name: value for name, value in machine(0).items() if name != "threads"}
    if found != expected:
        names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        other = "; ".join(f"{n} {found.get(n)}, planned {expected.get(n)}" for n in names)
        raise ExecutorError(
            f"{platform.node()}: a worker runs on another machine than the run was planned for "
            f"({other}) and would round otherwise; keep such nodes out of the cluster, then resume"
        )


def versions() -> dict[str, str]:
    """Versions of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_device() -> None:
    """Check that JAX computes on the GPU, in a process that is given one.

    Raises:
        ExecutorError: it cannot; the message names this node and says what to do.
    """
    if os.environ.get("JAX_PLATFORMS") != "cuda":
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX sees no device file
        reason = str(error).strip().partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        if not _installed_plugins():
            reason = "JAX's CUDA plugin is not installed"
        raise ExecutorError(
            f"{platform.node()}: a GPU is booked for this worker, and JAX cannot use it "
            f"({reason or 'no NVIDIA device is visible'}); install quantfleet[cuda12] and "
            "NVIDIA's driver on that node, or use --device cpu"
        ) from error


def _installed_plugins() -> list[str]:
    found = importlib.util.find_spec("jax_plugins") is not None
    names = _CUDA_PLUGINS if found else {}
    return [name for name, module in names.items() if importlib.util.find_spec(module) is not None]


def _cuda_plugin() -> str:
    installed = _installed_plugins()
    if not installed:
        raise ExecutorError(
            f"{platform.node()}: JAX computes on {jax.default_backend()} without its CUDA plugin; "
            "workers compute on CPUs or on NVIDIA's GPUs: install quantfleet[cuda12], or use "
            "--device cpu"
        )
    return installed[0]


def cuda_versions(plugin: str) -> dict[str, str]:
    """Versions of what computes on a GPU: JAX's plugin, NVIDIA's libraries and the driver.

    Args:
        plugin: the distribution's name.
    """
    # As loaded, wherever from; they need not be those of NVIDIA's wheels.
    loaded = importlib.import_module(_CUDA_PLUGINS[plugin]).cuda_versions
    found = {
        plugin: importlib.metadata.version(plugin),
        "cuBLAS": str(loaded.cublas_get_version()),
        "cuDNN": str(loaded.cudnn_get_version()),
        "driver": _driver_version(),
    }
    if _TF32 in os.environ:
        found[_TF32] = os.environ[_TF32]
    return found


def _driver_version() -> str:
    """The NVIDIA driver's, such as 570.86.15; "unknown" where the kernel does not say."""
    try:
        text = _DRIVER.read_text("ascii", "replace")
    except OSError:
        return "unknown"
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return number[0] if number else "unknown"

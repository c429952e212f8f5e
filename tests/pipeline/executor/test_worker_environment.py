"""What processes that compute are started with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.executor.protocol import Allocation, ExecutorError
from pipeline.executor.worker_environment import (
    GPU_FLAGS,
    GPU_MEMORY_VARIABLE,
    with_gpu_flags,
    worker_environment,
)

ON_CPU = Allocation(workers=2, threads=3)
ON_GPU = Allocation(workers=2, threads=3, gpus=1)
NEEDED = " ".join(f"{name}={value}" for name, value in GPU_FLAGS.items())


def test_a_worker_is_given_its_backend_and_threads_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    given = worker_environment(ON_CPU)
    assert given["KERAS_BACKEND"] == "jax"
    assert given["NPROC"] == given["OMP_NUM_THREADS"] == "3"
    assert given["JAX_PLATFORMS"] == "cpu"
    assert given["XLA_FLAGS"] == ""
    assert "canary" not in str(given) + str(worker_environment(ON_GPU))


def test_a_worker_on_a_gpu_computes_nowhere_else_and_always_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    given = worker_environment(ON_GPU)
    assert given["JAX_PLATFORMS"] == "cuda"
    assert given["XLA_FLAGS"] == (
        "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false "
        "--xla_gpu_autotune_level=0"
    )
    # What a node has for others does not decide what the host adds up.
    assert given["OMP_NUM_THREADS"] == given["OPENBLAS_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--xla_dump_to=/tmp/x", f"--xla_dump_to=/tmp/x {NEEDED}"),
        (NEEDED, NEEDED),
        (
            "  --xla_gpu_deterministic_ops  --xla_gpu_enable_triton_gemm=False",
            "--xla_gpu_deterministic_ops --xla_gpu_enable_triton_gemm=False "
            "--xla_gpu_autotune_level=0",
        ),
    ],
)
def test_flags_of_the_user_are_kept(flags: str, expected: str) -> None:
    assert with_gpu_flags(flags) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xla_gpu_autotune_level=4", "autotune_level=4 lets .* set --xla_gpu_autotune_level=0"),
        ("--xla_gpu_enable_triton_gemm", "enable_triton_gemm lets two processes"),
        ("--xla_gpu_deterministic_ops=false", "deterministic_ops=false lets two processes"),
        (f"{NEEDED} --xla_gpu_autotune_level=1", "autotune_level=1 lets two processes"),
        ("/etc/flags", "XLA_FLAGS names a file, /etc/flags"),
    ],
)
def test_flags_that_contradict_are_refused(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ExecutorError, match=message) as raised:
        worker_environment(ON_GPU)
    assert "\n" not in str(raised.value)
    assert worker_environment(ON_CPU)["XLA_FLAGS"] == flags


def test_a_worker_reserves_most_of_its_gpu_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reserved() -> tuple[str, str]:
        given = worker_environment(ON_GPU)
        return given["XLA_PYTHON_CLIENT_PREALLOCATE"], given["XLA_CLIENT_MEM_FRACTION"]

    monkeypatch.delenv(GPU_MEMORY_VARIABLE, raising=False)
    assert reserved() == ("true", "0.9")
    monkeypatch.setenv(GPU_MEMORY_VARIABLE, "0.5")
    assert reserved() == ("true", "0.5")
    monkeypatch.setenv(GPU_MEMORY_VARIABLE, "0")
    assert reserved()[0] == "false"
    for wrong in ("1.5", "-1", "most", "nan"):
        monkeypatch.setenv(GPU_MEMORY_VARIABLE, wrong)
        with pytest.raises(ExecutorError, match=rf"{GPU_MEMORY_VARIABLE} .* 0 to 1, not '{wrong}'"):
            worker_environment(ON_GPU)
    assert worker_environment(ON_CPU)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


# Each as a process of its own: JAX reads its environment once.
_STARTED = """
import jax
try:
    jax.devices()
except Exception:
    from jaxlib.xla_client import generate_pjrt_gpu_plugin_options
    from pipeline.executor.protocol import ExecutorError
    from pipeline.machine import check_device
    print(generate_pjrt_gpu_plugin_options())
    try:
        check_device()
    except ExecutorError as error:
        print(error)
else:
    print("JAX started", jax.default_backend())
"""


def started_with(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _STARTED],
        env=os.environ | {"XLA_CLIENT_MEM_FRACTION": "", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
    )


def test_a_gpu_worker_without_a_gpu_fails_and_says_what_to_do() -> None:
    done = started_with(worker_environment(ON_GPU))
    options, message = done.stdout.splitlines()
    assert "'memory_fraction': 0.9" in options
    assert "'preallocate': True" in options
    assert "a GPU is booked for this worker, and JAX cannot use it (" in message
    assert message.endswith("or use --device cpu")


def test_xla_knows_the_flags_that_gpu_workers_need() -> None:
    # Every process parses them; with one that XLA does not know, none would start.
    given = worker_environment(ON_GPU) | {"JAX_PLATFORMS": "cpu"}
    done = started_with(given)
    assert done.stdout.strip() == "JAX started cpu", done.stderr[-500:]
    unknown = given["XLA_FLAGS"].replace("autotune_level", "autotune_levels")
    assert "Unknown flag" in started_with(given | {"XLA_FLAGS": unknown}).stderr

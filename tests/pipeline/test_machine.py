"""The machine that a plan names, and workers that are on another."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import pipeline.machine
from pipeline.executor.protocol import ExecutorError
from pipeline.machine import check_device, check_machine, cuda_versions, machine


def test_a_cpu_is_named_with_the_threads_that_decide_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert machine(3) == {"platform": "cpu", "device": "cpu", "threads": "3"}
    monkeypatch.setenv("XLA_FLAGS", " --xla_dump_to=/x  --xla_cpu_enable_fast_math=true ")
    assert machine(3)["XLA_FLAGS"] == "--xla_dump_to=/x --xla_cpu_enable_fast_math=true"


def test_a_worker_on_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    check_machine(machine(2))
    check_machine({"platform": "cpu", "device": "cpu"})  # its threads are its allocation's
    planned = {"platform": "gpu", "device": "NVIDIA L4", "driver": "570.86.15"}
    with pytest.raises(
        ExecutorError,
        match=r"device cpu, planned NVIDIA L4; driver None, planned 570\.86\.15; platform cpu, "
        r"planned gpu\) and would round otherwise; keep such nodes out",
    ):
        check_machine(planned)


def test_a_worker_on_cpus_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for platforms in ("cpu", ""):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        check_device()


def test_a_gpu_is_named_with_what_computes_on_it_and_without_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the plugin's own module stood in for: the lock installs none on CPUs."""
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    loaded = SimpleNamespace(cublas_get_version=lambda: 120903, cudnn_get_version=lambda: 92800)
    found = importlib.import_module

    def import_module(name: str) -> object:
        known = name == "jax_plugins.xla_cuda12"
        return SimpleNamespace(cuda_versions=loaded) if known else found(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 0.10.2")
    monkeypatch.setattr(pipeline.machine, "_DRIVER", driver)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    expected = {
        "jax-cuda12-plugin": "jax-cuda12-plugin 0.10.2",
        "cuBLAS": "120903",
        "cuDNN": "92800",
        "driver": "570.86.15",
    }
    assert cuda_versions("jax-cuda12-plugin") == expected
    driver.unlink()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert cuda_versions("jax-cuda12-plugin") == expected | {
        "driver": "unknown",
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr(pipeline.machine, "_cuda_plugin", lambda: "jax-cuda12-plugin")
    assert machine(3).keys() == {"platform", "device", "NVIDIA_TF32_OVERRIDE", *expected}


def test_gpus_of_another_maker_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: "rocm")
    monkeypatch.setattr("pipeline.machine._installed_plugins", list)  # wherever the tests run
    with pytest.raises(ExecutorError, match="computes on rocm without its CUDA plugin"):
        machine(1)

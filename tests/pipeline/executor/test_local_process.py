"""A child process plans: with its environment, its errors as they were raised, and no orphan."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.executor.local_process import local_process
from pipeline.executor.protocol import Allocation, ExecutorError
from pipeline.executor.worker_environment import worker_environment


def environment_of(name: str) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get(name)


def fail(kind: str) -> None:
    if kind == "crash":
        os.write(2, b"out of luck\n")
        os._exit(7)
    raise SourceError(f"{kind}: no config.json there")


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_functions_run_in_a_child_with_its_environment() -> None:
    with local_process({"NPROC": "7"}) as process:
        process_id, value = process.run(environment_of, "NPROC")
        assert value == "7"
        assert process_id != os.getpid()
        assert process.run(environment_of, name="HOME") == (process_id, os.environ.get("HOME"))
    assert not is_alive(process_id)


def test_an_error_arrives_as_it_was_raised_and_the_child_goes_on() -> None:
    with local_process({}) as process:
        with pytest.raises(SourceError, match=r"/nowhere: no config\.json there") as raised:
            process.run(fail, "/nowhere")
        assert "in fail" in "".join(raised.value.__notes__)
        assert process.run(environment_of, "NO_SUCH_VARIABLE")[1] is None


def test_a_child_that_dies_is_an_error_with_its_last_words() -> None:
    with (
        local_process({}) as process,
        pytest.raises(ExecutorError, match="exit status 7: out of luck"),
    ):
        process.run(fail, "crash")


def test_stopping_ends_what_the_child_is_doing() -> None:
    with local_process({}) as process, ThreadPoolExecutor(1) as pool:
        process_id, _ = process.run(environment_of, "HOME")
        sleeping = pool.submit(process.run, time.sleep, 600.0)
        start = time.monotonic()
        process.stop()
        with pytest.raises(ExecutorError, match="ended early"):
            sleeping.result()
        assert time.monotonic() - start < 5
    assert not is_alive(process_id)


def arithmetic() -> tuple[str, str, str, str, dict[str, str]]:
    import jax
    import jax.numpy as jnp
    import keras

    from pipeline.machine import machine

    return (
        keras.config.floatx(),
        str(jnp.arange(2).dtype),
        str(jax.config.jax_default_matmul_precision),
        # Refused where promotion is strict.
        str((jnp.ones(1, jnp.int32) + jnp.ones(1, jnp.float16)).dtype),
        machine(2),
    )


def test_the_environment_around_a_run_decides_no_arithmetic_but_by_flags_that_the_plan_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "keras.json").write_text('{"floatx": "float16", "epsilon": 0.1}')
    flags = "--xla_force_host_platform_device_count=1 --xla_cpu_enable_fast_min_max=false"
    for name, value in {
        "XDG_CACHE_HOME": str(tmp_path),
        "KERAS_HOME": str(home),
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "XLA_FLAGS": f" {flags.replace(' ', '  ')}",
    }.items():
        monkeypatch.setenv(name, value)
    with local_process(worker_environment(Allocation(workers=1, threads=2))) as process:
        *settings, machine = process.run(arithmetic)
    assert settings == ["float32", "int32", "default", "float16"]
    assert machine == {"platform": "cpu", "device": "cpu", "threads": "2", "XLA_FLAGS": flags}

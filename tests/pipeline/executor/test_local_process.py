"""A child process plans: with its environment, its errors as they were raised, and no orphan."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import SourceError
from pipeline.executor.local_process import local_process
from pipeline.executor.protocol import ExecutorError


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

"""SIGTERM ends a block like Ctrl-C, once, and is told apart from it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from jobs.termination import Terminated, terminable
from tests.integration.ray_cluster import quiet_environment
from tests.pipeline.tiny_runs import recipe, source
from tests.selection import by_default


def wait() -> None:
    """Wait for what a signal raises, which Python may do only between two calls."""
    for _ in range(1000):
        time.sleep(0.01)


def test_sigterm_ends_the_block_and_the_end_is_not_disturbed() -> None:
    ended = []

    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                wait()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        work()
    assert ended
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_is_known_even_where_a_library_raises_something_plainer() -> None:
    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                wait()
            except Terminated:
                raise KeyboardInterrupt from None

    with pytest.raises(Terminated):
        work()


def test_ctrl_c_stays_ctrl_c() -> None:
    def work() -> None:
        with terminable():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


def test_a_signal_is_not_lost_where_nothing_can_be_raised() -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    def work() -> None:
        with terminable():
            Finalized()
            wait()

    with pytest.raises(Terminated):
        work()


def test_what_libraries_make_of_a_signal_is_still_its_end() -> None:
    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                wait()
            except Terminated as end:
                raise SystemError("a result with an exception set") from end

    with pytest.raises(Terminated):
        work()


def test_a_handler_that_a_library_installs_gets_no_signal() -> None:
    # In a process of its own: here there are threads that are older than the block.
    program = """
import os, signal, time
from jobs.termination import Terminated, terminable
try:
    with terminable():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
except Terminated:
    print("in order")
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "in order\n"), finished.stderr


def test_a_signal_while_the_block_ends_is_not_left_to_the_handler_of_before() -> None:
    # As Ray's: it ends the process. In one of its own, where no thread is older than the block.
    program = """
import os, signal, sys
from jobs.termination import Terminated, terminable
signal.signal(signal.SIGTERM, lambda *_: sys.exit("not in order"))
try:
    with terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
except Terminated:
    print("in order")
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "in order\n"), finished.stderr


def test_cleaning_up_that_takes_for_ever_is_cut_off() -> None:
    program = """
import os, signal, time
import jobs.termination
jobs.termination._CLEANUP_SECONDS = 0.2
with jobs.termination.terminable():
    try:
        os.kill(os.getpid(), signal.SIGNAL)
        time.sleep(30)
    finally:
        time.sleep(30)
"""
    for name, exit_code in (("SIGTERM", 143), ("SIGINT", 130)):
        given = [sys.executable, "-c", program.replace("SIGNAL", name)]
        assert subprocess.run(given, capture_output=True).returncode == exit_code


def test_a_signal_that_interrupts_nothing_is_sent_again() -> None:
    program = """
import os, signal, time
import jobs.termination
send, sent = jobs.termination._send, []
def lose_the_first(thread, number):
    sent.append(number)
    if len(sent) > 1:
        send(thread, number)
jobs.termination._send = lose_the_first
with jobs.termination.terminable():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert b"Terminated" in ended.stderr


def test_a_child_can_be_ended_although_the_block_holds_the_signal_back() -> None:
    program = """
import subprocess
from jobs.termination import terminable
with terminable():
    # As Ray starts its processes.
    child = subprocess.Popen(["sleep", "30"], preexec_fn=lambda: None)
    child.terminate()
    print(child.wait(timeout=10))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.stdout == f"{-signal.SIGTERM}\n", finished.stderr


_EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def interrupted_run(folder: Path, number: signal.Signals, seconds: float) -> tuple[int, str]:
    """The exit code and stderr of a run that got a signal after so many seconds."""
    given = yaml.safe_dump(recipe("gptq", num_samples=2, sequence_length=32).to_dict())
    (folder / "recipe.yaml").write_text(given)
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "out")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "jobs.cli.start", "quantize", str(source()), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment() | {"QUANTFLEET_LOG": "text"},
    )
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def check_ends(
    folder: Path, number: signal.Signals, moments: Sequence[float], started: float = 0.0
) -> None:
    """Args: started: seconds after which the command is surely up."""
    for seconds in moments:
        status, errors = interrupted_run(folder, number, seconds)
        expected = [_EXIT_CODES[number], 0]
        if seconds < started and "jobs" not in errors:
            # Before the command's first line: the system ends the process, of which shells say the
            # same, or Python fails to start.
            expected += [-number, 1]
        assert status in expected, f"{number.name} after {seconds:.3f} s: {status}\n{errors}"
        # NumPy prints what interrupts its import.
        if seconds >= started and "_multiarray_umath failed to import" not in errors:
            assert "Traceback" not in errors, f"{number.name} after {seconds:.3f} s\n{errors}"
        assert "internal error" not in errors
        shutil.rmtree(folder / "out", ignore_errors=True)


@pytest.mark.ray
@pytest.mark.parametrize("number", by_default(_EXIT_CODES, [signal.SIGTERM]))
def test_a_signal_while_planning_ends_the_command(number: signal.Signals, tmp_path: Path) -> None:
    check_ends(tmp_path, number, [2.5])


@pytest.mark.ray
@pytest.mark.slow  # a minute and a half each
@pytest.mark.parametrize("number", _EXIT_CODES)
def test_a_signal_at_any_moment_ends_the_command(number: signal.Signals, tmp_path: Path) -> None:
    seeded = random.Random(int(number))
    moments = [seeded.uniform(0.0, 15.0) for _ in range(20)]
    early = [seeded.uniform(0.0, 0.5) for _ in range(20)]
    check_ends(tmp_path, number, [*early, *moments], started=1.0)

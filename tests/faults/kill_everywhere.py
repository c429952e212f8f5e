"""SIGKILL before and after every storage operation of a run, each in a process of its own.

    python -m tests.faults.kill_everywhere [--stride 1] [--scheme gptq] [--late] [--processes 2]

Driver and workers are one process here, so that every operation of the run is met, in order; what
each killed process leaves is resumed in this one, and must end in the same bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.storage.object_store import open_store
from tests.faults.killed_run import Given, run
from tests.pipeline import tiny_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", default="gptq")
    parser.add_argument("--stride", type=int, default=1, help="only every n-th operation")
    parser.add_argument(
        "--late", action="store_true", help="commit each block when the next one is solved"
    )
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-everywhere-"))
    # Children are forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.killed_run"])
    given = Given.of(arguments.scheme)
    whole = str(work / "whole")
    count = run(whole, given, 0, after=False, late=arguments.late)
    expected = tiny_runs.lasting(open_store(whole))
    print(f"{count} storage operations, {len(expected)} objects", flush=True)

    def killed(number: int, after: bool) -> str:
        folder = str(work / f"{number}-{after}")
        how = {"after": after, "late": arguments.late}
        process = context.Process(target=run, args=(folder, given, number), kwargs=how)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        return folder

    cases = [(n, after) for n in range(1, count + 1, arguments.stride) for after in (False, True)]
    different = 0
    with ThreadPoolExecutor(arguments.processes) as pool:
        for case, folder in zip(cases, pool.map(lambda c: killed(*c), cases), strict=True):
            run(folder, given, 0, after=False, late=False)
            same = tiny_runs.lasting(open_store(folder)) == expected
            different += not same
            print(f"{case[0]} {'after' if case[1] else 'before'}: same bytes: {same}", flush=True)
            shutil.rmtree(folder)
    shutil.rmtree(work)
    print(f"{len(cases)} kills, {different} runs that ended otherwise")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

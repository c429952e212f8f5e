"""The command: run rows, print the table, compare rows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.benchmarks.quality import __doc__ as summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure rows that are not there yet")
    run.add_argument("rows", nargs="+", metavar="ROW")
    run.add_argument("--draws", nargs="+", type=int, default=[0], help="calibration seeds")
    run.add_argument("--envs", type=Path, help="the peers' environments, made where missing")
    table = commands.add_parser("table", help="every row on every kind of text")
    table.add_argument("rows", nargs="*", metavar="ROW", help="all if none is named")
    compare = commands.add_parser("compare", help="rows less the first one, paired")
    compare.add_argument("rows", nargs="+", metavar="ROW")
    for command in (run, table, compare):
        command.add_argument("--results", type=Path, required=True, help="a folder")
        command.add_argument(
            "--quick",
            action="store_true",
            help="quantize only the first four blocks, and judge on a quarter of the windows",
        )
    arguments = parser.parse_args()
    if arguments.command == "run":
        _run(arguments)
    else:
        _print(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from tests.benchmarks.quality.measure import Measure
    from tests.benchmarks.quality.rows import Row

    rows = [Row.parse(row) for row in arguments.rows]
    environments = arguments.envs and arguments.envs.resolve()
    measure = Measure(arguments.results, environments, quick=arguments.quick)
    for draw in arguments.draws:
        for row in rows:
            began = time.perf_counter()
            judged = measure.run(row, draw)
            seconds = time.perf_counter() - began
            if judged is None:
                print(f"{row}, draw {draw}: known", flush=True)
                continue
            kls = (f"{kind} {sum(v['kl']) / len(v['kl']):.4f}" for kind, v in judged.values.items())
            print(f"{row}, draw {draw}: KL {', '.join(kls)}; {seconds:.0f} s", flush=True)


def _print(arguments: argparse.Namespace) -> None:
    from tests.benchmarks.quality.results import FULL, QUICK, Results
    from tests.benchmarks.quality.rows import Row
    from tests.benchmarks.quality.tables import comparison, table

    results = Results(arguments.results)
    form = QUICK if arguments.quick else FULL
    rows = [str(Row.parse(row)) for row in arguments.rows]
    rows = rows or list(dict.fromkeys(j.row for j in results.read() if j.form == form))
    show = table if arguments.command == "table" else comparison
    print(show(results, rows, form))


if __name__ == "__main__":
    main()

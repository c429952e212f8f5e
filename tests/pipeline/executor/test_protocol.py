from typing import Any

from pipeline.executor.protocol import argument, group_of
from pipeline.run.worker_api import WorkerApi
from tests.pipeline.local_executor import LocalExecutor


class Adder:
    def add(self, left: int, right: int) -> int:
        return left + right


def test_handles_stand_for_results() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    first = executor.submit(0, Adder.add, 1, 2)
    assert executor.fetch([executor.submit(1, Adder.add, argument(first), 4)]) == [7]


def test_what_waits_for_storage_runs_beside_what_computes() -> None:
    groups: dict[str, Any] = {
        name: group_of(getattr(WorkerApi, name))
        for name in vars(WorkerApi)
        if not name.startswith("_")
    }
    assert {name: group for name, group in groups.items() if group} == {
        "read": "read",
        "commit": "commit",
        "commit_sums": "commit",
        "settle": "commit",
    }
